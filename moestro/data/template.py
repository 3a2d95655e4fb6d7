"""Messages to ids: the chat template, and how it keeps a message from forging a role.

A template is Jinja: ours (DeepSeek-R1's layout: BOS, system text, `<｜User｜>…<｜Assistant｜>…<EOS>`)
or the one that came with a checkpoint. It is rendered to text, and the special tokens found there become ids.
If a message spells `<｜Assistant｜>`, that must stay text. So before rendering, an invisible mark is put after
every character of the messages that could begin a special token; only the template's own tokens are found, and
the marks are removed again. Assistant messages may hold real `<think>` tags, which templates look for.

Foreign templates run in Jinja's immutable sandbox, with bounds on their size, loop depth, repetition and output.
That stops cheap attacks, but not every slow program, so a server renders outside its event loop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moestro.data.specials import CHAT_TEMPLATE
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 128 * 1024
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
MAX_LOOP_DEPTH = 4
_THINK_TAGS = re.compile("(</?think>)")


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Ids of a conversation; only the template gives special tokens.

    Each message has `role` (one of `ROLES`) and `content`. `template` defaults to the tokenizer's own, else
    to `CHAT_TEMPLATE`. Raises `DataError` for bad messages and for templates that fail or exceed their bounds.
    """
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str | None):
            raise DataError(f"a chat message needs a role of {', '.join(ROLES)} and a content that is a string")
    template = template or tokenizer.chat_template or CHAT_TEMPLATE
    if template == CHAT_TEMPLATE and (tokenizer.user_id is None or tokenizer.assistant_id is None):
        raise DataError("this tokenizer has no tokens for user and assistant, and brings no chat template")
    mark = _choose_mark(messages)
    starts = re.compile("[" + re.escape("".join(sorted({name[0] for name in tokenizer.specials}))) + "]")
    marked = [_mark_message(message, starts, mark) for message in messages]
    text = _render(template, marked, tokenizer, add_generation_prompt)
    return _encode_rendered(text, mark, tokenizer)


def _encode_rendered(text: str, mark: str, tokenizer: Tokenizer) -> list[int]:
    longest_first = sorted(tokenizer.specials, key=len, reverse=True)
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
        if part in tokenizer.specials:
            ids.append(tokenizer.specials[part])
        elif part:
            ids.extend(tokenizer.encode(part.replace(mark, "")))
    return ids


def _choose_mark(messages: Sequence[Mapping[str, Any]]) -> str:
    """A string of Unicode non-characters that no message contains."""
    text = json.dumps([dict(message) for message in messages], ensure_ascii=False, default=str)
    return next(mark for length in count(1) if (mark := "\ufdd0" * length + "\ufdd1") not in text)


def _mark_message(message: Mapping[str, Any], starts: re.Pattern[str], mark: str) -> dict[str, Any]:
    marked = {key: _mark_value(value, starts, mark) for key, value in message.items() if key != "role"}
    if message["role"] == "assistant" and isinstance(message.get("content"), str):
        parts = _THINK_TAGS.split(message["content"])
        marked["content"] = "".join(
            part if _THINK_TAGS.fullmatch(part) else _mark_value(part, starts, mark) for part in parts
        )
    return {"role": message["role"], **marked}


def _mark_value(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return starts.sub(lambda match: match[0] + mark, value)
    if isinstance(value, Mapping):
        return {_mark_value(key, starts, mark): _mark_value(item, starts, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark_value(item, starts, mark) for item in value]
    return value


def has_own_template(tokenizer: Tokenizer) -> bool:
    """Whether a checkpoint brings a chat template of its own, as models trained on conversations do.

    Ours is in every checkpoint that we write, whatever it was trained on, and training reads plain text. So a model
    with no template but ours continues text rather than answers.
    """
    return tokenizer.chat_template not in (None, CHAT_TEMPLATE)


def _render(template: str, messages: list[dict[str, Any]], tokenizer: Tokenizer, add_prompt: bool) -> str:
    names = {id: name for name, id in tokenizer.specials.items()}
    parts: list[str] = []
    size = 0
    try:
        for part in _compile(template).generate(
            messages=messages,
            bos_token=names.get(tokenizer.bos_id, ""),
            eos_token=names.get(tokenizer.eos_id, ""),
            pad_token=names.get(tokenizer.pad_id, ""),
            add_generation_prompt=add_prompt,
        ):
            parts.append(part)
            size += len(part)
            if size > MAX_OUTPUT_CHARS:
                raise DataError(f"chat template: more than {MAX_OUTPUT_CHARS} characters of output")
    except DataError:
        raise
    except Exception as error:  # a template is a program and may fail in any way
        raise DataError(f"chat template: {error}") from error
    return "".join(parts)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, without the operators that turn a short template into gigabytes."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse powers, and repeating or formatting strings and lists; other arithmetic works as usual."""
        if operator == "**" or not all(isinstance(value, int | float) for value in (left, right)):
            raise SecurityError(f"operator '{operator}' is bounded to products of numbers")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise DataError(f"chat template: longer than {MAX_TEMPLATE_CHARS} characters")
    environment = _BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    for name in (
        "center",
        "indent",
        "format",
        "wordwrap",
    ):  # each pads by a number that the template chooses
        environment.filters.pop(name)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        if _measure_loops(environment.parse(template)) > MAX_LOOP_DEPTH:
            raise DataError(f"chat template: loops nested deeper than {MAX_LOOP_DEPTH}")
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise DataError(f"chat template: {error}") from error


def _measure_loops(node: nodes.Node) -> int:
    depth = max((_measure_loops(child) for child in node.iter_child_nodes()), default=0)
    return depth + isinstance(node, nodes.For)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as chat templates expect it: without HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent if indent is None else min(indent, 8))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
