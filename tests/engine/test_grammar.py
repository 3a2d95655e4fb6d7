"""Structured output: what a mask lets through is checked against json, re and the vocabulary itself; limits hold."""

from __future__ import annotations

import json
import random
import re

import pytest

from moestro.data.tokenizer import Tokenizer
from moestro.engine.grammar import (
    MAX_CHARS,
    MAX_LINES,
    GrammarCompiler,
    GrammarError,
    from_calls,
    from_choices,
    from_json_schema,
    from_lark,
    from_regex,
)
from moestro.errors import ConfigError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 9)


def write_text(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, seed: int) -> str:
    """A random walk: any allowed token, the end where it comes up or nothing else is left."""
    matcher, ids, rng = compiler.compile(grammar), list[int](), random.Random(seed)
    while not matcher.is_finished:
        ids.append(rng.choice(matcher.allowed().nonzero().flatten().tolist()))
        matcher.advance(ids[-1])
        assert len(ids) < 2000
    return tokenizer.decode(ids)


def test_random_walks_follow_a_schema(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    names = set()
    for seed in range(30):
        found = json.loads(write_text(compiler, tokenizer, from_json_schema(PERSON), seed))
        assert set(found) == {"name", "age"}
        assert isinstance(found["age"], int) and 0 <= found["age"] <= 99
        assert len(found["name"]) <= 5
        names.add(found["name"])
    assert len(names) > 5
    assert from_json_schema(json.dumps(PERSON)) == from_json_schema(PERSON)


def test_random_walks_follow_a_pattern_and_a_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    pattern = r"(ab|cat)+[0-9]{2,4}(!|é)?"
    sums = from_lark('start: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]{0,2}/')
    for seed in range(30):
        assert re.fullmatch(pattern, write_text(compiler, tokenizer, from_regex(pattern), seed))
        assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2})*", write_text(compiler, tokenizer, sums, seed))


def test_a_mask_names_all_tokens_that_fit_and_no_other(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(from_regex("(cat|dog)s?"))
    for id, allowed in enumerate(matcher.allowed().tolist()):
        is_text = id < tokenizer.vocab_size and id not in tokenizer.specials.values()
        piece = tokenizer.pieces[id].decode("utf-8", "replace") if is_text else ""
        assert allowed == (piece != "" and any(text.startswith(piece) for text in ("cats", "dogs")))


def test_the_end_is_allowed_where_the_text_is_complete_only(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher, end = compiler.compile(from_regex("z{2,3}")), tokenizer.eos_id
    (z,) = tokenizer.encode("z")
    seen = []
    for _ in range(3):
        seen.append((bool(matcher.allowed()[end]), matcher.is_finished))
        matcher.advance(z)
    assert seen == [(False, False), (False, False), (True, False)]
    assert matcher.is_finished
    other = GrammarCompiler(tokenizer, tokenizer.vocab_size, [40]).compile(from_regex("z*"))
    assert other.allowed().nonzero().flatten().tolist() == sorted([end, 40, z])


def test_control_tokens_never_pass_and_visible_ones_where_named(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    think, end = tokenizer.specials["<think>"], tokenizer.eos_id
    anything = compiler.compile(from_regex(r"(?s:.*)")).allowed()
    assert [id for id in tokenizer.specials.values() if anything[id]] == [end]
    assert not anything[tokenizer.vocab_size :].any()
    named = compiler.compile(from_lark('start: <think> "a"'))
    assert named.allowed().nonzero().flatten().tolist() == [think]
    with pytest.raises(ConfigError, match="no token"):
        compiler.compile(from_lark('start: <｜User｜> "a"'))
    matcher = compiler.compile(from_lark('start: "a" <｜User｜>'))
    matcher.advance(tokenizer.encode("a")[0])
    with pytest.raises(GrammarError, match="no token"):
        matcher.allowed()


def test_copies_go_on_apart(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    one = compiler.compile(from_regex("aab|ba"))
    two = one.copy()
    one.advance(a)
    two.advance(b)
    assert one.allowed()[a] and not one.allowed()[b]
    two.advance(a)
    assert two.is_finished and not one.is_finished
    with pytest.raises(GrammarError, match="grammar failed"):
        one.advance(b)


CHAIN = {
    "type": "object",
    "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}


def check_chain(tree: object) -> int:
    """The length of a chain; fails for anything that is none."""
    length = 0
    while tree is not None:
        assert isinstance(tree, dict) and set(tree) == {"v", "next"} and isinstance(tree["v"], bool)
        tree, length = tree["next"], length + 1
    return length


@pytest.mark.parametrize("identity", [{}, {"$id": "http://example.org/chain"}])
def test_calls_may_refer_to_the_whole_of_their_own_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, identity: dict[str, str]
) -> None:
    grammar = from_calls({"walk": {**CHAIN, **identity}})
    calls = [json.loads(write_text(compiler, tokenizer, grammar, seed)) for seed in range(40)]
    assert {call["name"] for call in calls} == {"walk"} and all(set(call) == {"name", "arguments"} for call in calls)
    assert len({check_chain(call["arguments"]) for call in calls}) > 2


def test_definitions_of_one_name_stay_with_their_function(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    def takes(kind: str, reference: str, **definition: object) -> dict[str, object]:
        properties = {"x": {"$ref": reference}}
        shape = {"type": "object", "properties": properties, "required": ["x"], "additionalProperties": False}
        return {**shape, "$defs": {"T": {"type": kind, **definition}}}

    functions = {
        "a": takes("boolean", "#/$defs/T"),
        "b": takes("integer", "#/$defs/T", minimum=0, maximum=9),
        "c": takes("null", "#here", **{"$anchor": "here"}),
    }
    kinds = {"a": bool, "b": int, "c": type(None)}
    seen = set()
    for seed in range(40):
        call = json.loads(write_text(compiler, tokenizer, from_calls(functions), seed))
        assert type(call["arguments"]["x"]) is kinds[call["name"]]
        seen.add(call["name"])
    assert seen == set(kinds)


def test_json_is_written_without_white_space_between_its_parts(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for seed in range(20):
        for grammar in (from_json_schema(PERSON), from_calls({"f": PERSON})):
            text = write_text(compiler, tokenizer, grammar, seed)
            assert re.sub(r'"(?:[^"\\]|\\.)*"', "", text).isprintable()
            assert " " not in re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    spaced = from_json_schema({**PERSON, "x-guidance": {"whitespace_pattern": " *"}})
    assert spaced == from_json_schema(PERSON)


def test_choices_are_taken_word_for_word(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ['say "no"', "a\\b", "line\nbreak", "é", "/x/"]
    assert {write_text(compiler, tokenizer, from_choices(choices), seed) for seed in range(60)} == set(choices)


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"properties": {"p": {"contains": {}}}}, "#/properties/p", "contains"),
        (
            {"properties": {"a/b": {"items": {"pattern": "x(?!0)"}}}},
            "#/properties/a~1b/items",
            "character 2: look-around",
        ),
        ({"$defs": {"T": {"anyOf": [{}, {"type": "objekt"}]}}, "$ref": "#/$defs/T"}, "#/$defs/T/anyOf/1", "objekt"),
        ({"items": {"$ref": "#/$defs/none"}}, "#/items/$ref", "there is no #/$defs/none"),
        ({"prefixItems": [{}, {"minLength": "x"}]}, "#/prefixItems/1", "minLength"),
        ({"additionalProperties": {"format": "no such"}}, "#/additionalProperties", "no such"),
    ],
)
def test_what_a_schema_asks_in_vain_is_named_with_its_place(schema: dict[str, object], place: str, reason: str) -> None:
    for make in (from_json_schema, lambda schema: from_calls({"good": PERSON, "bad": schema})):
        with pytest.raises(ConfigError, match=re.escape(reason)) as raised:
            make(schema)
        assert f"at {place}: " in str(raised.value)


def nested_schema(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: from_regex("("), "invalid regex"),
        (lambda: from_lark("start: missing"), "unknown name"),
        (lambda: "{", "EOF"),
        (lambda: from_json_schema("[1"), "not valid JSON"),
        (lambda: from_json_schema("[1]"), "object"),
        (lambda: from_json_schema({"type": {1, 2}}), "not valid JSON"),
        (lambda: from_json_schema({"not": {"type": "integer"}}), "not"),
        (lambda: from_json_schema({"$ref": "http://localhost/x"}), "retriev"),
        (lambda: from_json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "cannot be used"),
        (lambda: from_json_schema(nested_schema(500)), "recursion"),
        (lambda: from_json_schema(nested_schema(200_000)), "nested too deeply"),
        (lambda: from_regex("a" * (MAX_CHARS + 1)), "characters"),
        (lambda: from_lark("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(MAX_LINES))), "lines"),
        (lambda: from_regex("(" * 3000 + "a" + ")" * 3000), "invalid regex"),
        (lambda: from_lark("start: " + "(" * 3000 + '"a"' + ")" * 3000), "nested"),
    ],
)
def test_bad_and_excessive_grammars_are_refused_in_a_line(compiler: GrammarCompiler, make: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        compiler.compile(make())  # type: ignore[operator]
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_the_longest_chain_of_rules_that_is_accepted_is_safe(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    rules = MAX_LINES - 2
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(rules)) + f'r{rules}: "a"\n'
    assert compiler.compile(from_lark(chain)).allowed().nonzero().flatten().tolist() == tokenizer.encode("a")
