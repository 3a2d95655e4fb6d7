"""Text as it is sent equals the whole text cut once at the end, however it comes in pieces."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.data.tokenizer import Tokenizer
from moestro.engine.events import Event
from moestro.server.choices import Details, name_token
from moestro.server.stream import Splitter
from moestro.server.tools import Call, CallReader, read_call

TOKENIZER = Tokenizer.builtin()
PLAIN = Tokenizer.train(["abc abc <think> été 한국어 🙂"] * 3, 300)


def cut(text: str, places: list[int]) -> list[str]:
    """A text in pieces."""
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def test_a_token_that_is_half_a_character_is_named_by_its_bytes() -> None:
    assert name_token(PLAIN, PLAIN.pieces.index(b"\xf0")) == "bytes:\\xf0"
    assert name_token(PLAIN, 10_000) == ""


THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)(</think>(?P<answer>.*)|$)", re.DOTALL)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<th", "</", "ink>", " ", "\n", "a", "b<"]), max_size=12),
    st.lists(st.integers(0, 99)),
    st.booleans(),
)
def test_thoughts_are_split_off(parts: list[str], places: list[int], is_open: bool) -> None:
    text = "".join(parts)
    splitter = Splitter("reasoning" if is_open else None)
    found = [part for piece in cut(text, places) for part in splitter.push(piece)] + splitter.finish()
    got = {kind: "".join(text for k, text in found if k == kind) for kind in ("reasoning", "content")}
    match = THOUGHT.fullmatch("<think>" + text if is_open else text)
    if match:
        assert got == {"reasoning": match["thought"].lstrip(), "content": (match["answer"] or "").lstrip()}
    else:
        assert got == {"reasoning": "", "content": text}
    assert all(part for _, part in found)


DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
HERMES = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'


class WithTools:
    """As much of a tokenizer as the reader looks at."""

    def __init__(self) -> None:
        self.specials = {"<｜tool▁calls▁begin｜>": 1}


def read(text: str, places: list[int], **options: bool) -> list[str | tuple[str, str]]:
    reader = CallReader(WithTools(), **options)  # type: ignore[arg-type]
    found = [part for piece in cut(text, places) for part in reader.push(piece)] + reader.finish()
    merged: list[str | tuple[str, str]] = []
    for part in found:
        if isinstance(part, Call):
            merged.append((part.name, part.arguments))
        elif merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


@pytest.mark.parametrize(("form", "outer"), [(V3, DEEPSEEK), (V31, DEEPSEEK), (HERMES, "{}")])
@given(places=st.lists(st.integers(0, 999), max_size=6))
def test_calls_are_read_in_every_form(form: str, outer: str, places: list[int]) -> None:
    first, second = ("add", '{"a": "</x>", "b": [1, {"c": 2}]}'), ("look_up", "{}")
    text = "Let me see.\n" + outer.format(form.format(*first) + "\n" + form.format(*second))
    assert read(text, places) == ["Let me see.\n", first, second]
    assert read(text, places, many=False) == ["Let me see.\n", first]


MARKS = [
    "</tool_call>",
    "<tool_call>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    '"',
    "\\\\",
    "\\n",
    "{",
    "é",
    "a",
]


@pytest.mark.parametrize(("form", "outer"), [(V3, DEEPSEEK), (V31, DEEPSEEK), (HERMES, "{}")])
@given(parts=st.lists(st.sampled_from(MARKS), max_size=9), places=st.lists(st.integers(0, 999), max_size=6))
def test_marks_within_strings_end_no_call(form: str, outer: str, parts: list[str], places: list[int]) -> None:
    first = ("write", json.dumps({"text": "".join(parts), "then": ["".join(reversed(parts))]}, ensure_ascii=False))
    second = ("look_up", "{}")
    text = "Look:\n" + outer.format(form.format(*first) + form.format(*second))
    assert read(text, places) == ["Look:\n", first, second]


@pytest.mark.parametrize(
    "arguments", ['{"a":1,"a":2.50}', '{ "n" : 1e999 }', "[]", '{"s":"\\ud800 \\u00e9"}', '{"arguments":[{}]}']
)
def test_arguments_are_given_as_they_were_written(arguments: str) -> None:
    for text in (
        f'{{"name":"f","arguments":{arguments}}}',
        f' {{ "arguments" : {arguments} , "name": "f", "x": [1] }} ',
    ):
        call = read_call(text)
        assert call is not None and (call.name, call.arguments) == ("f", arguments)
    assert read_call('{"name": "f", "arguments": {"a": NaN}}') is None


def test_a_string_that_never_ends_hides_no_later_call() -> None:
    broken, good = '<tool_call>{"name": "f</tool_call>', HERMES.format("add", "{}")
    assert read(broken + good, [5]) == [broken, ("add", "{}")]
    assert read(broken + good + "rest", []) == [broken, ("add", "{}"), "rest"]


@given(st.lists(st.integers(0, 99), max_size=4))
def test_what_is_no_call_stays_text(places: list[int]) -> None:
    for text in ("a < b", "<tool_call>\nnot JSON\n</tool_call>", '<tool_call>\n{"name": "add", "argu', "<tool", ""):
        assert "".join(str(part) for part in read(text, places)) == text


def test_a_forced_call_has_no_marks() -> None:
    text = '{"name": "add", "arguments": {"a": 1}}'
    assert read(text, [3, 9], is_call=True) == [("add", '{"a": 1}')]
    assert read(text[:-3], [3, 9], is_call=True) == [text[:-3]]


def test_calls_without_tool_tokens_are_of_the_json_form_only() -> None:
    reader = CallReader(PLAIN)
    text = DEEPSEEK.format(V3.format("f", "{}"))
    assert "".join(str(part) for part in [*reader.push(text), *reader.finish()]).startswith("<｜tool▁call")


@pytest.mark.parametrize("text", ["[1]", '{"name": 3, "arguments": {}}', '{"name": "f"}', "[" * 100_000, "NaN"])
def test_json_that_is_no_call(text: str) -> None:
    assert read_call(text) is None


def test_details_tell_each_token_with_its_experts() -> None:
    import torch

    details = Details(PLAIN)
    routes = [torch.full((2, 2), n, dtype=torch.int16) for n in range(3)]
    events = [Event(0, 0, 20 + n, token_routes=routes[n], finish_reason="length" if n == 2 else None) for n in range(3)]
    told = [details.push(event) for event in events]
    assert [[(token["id"], token["routes"]) for token in tokens] for tokens in told] == [
        [],
        [(20, routes[1].tolist())],
        [(21, routes[2].tolist()), (22, None)],
    ]
