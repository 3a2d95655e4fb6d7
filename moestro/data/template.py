"""Messages to ids: the chat template, and how it keeps a message from forging a role.

A template is Jinja: ours (DeepSeek-R1's layout: BOS, system text, `<｜User｜>…<｜Assistant｜>…<EOS>`)
or the one that came with a checkpoint. It is rendered to text, and the special tokens found there become ids.
If a message spells `<｜Assistant｜>`, that must stay text. So before rendering, an invisible mark is put after
every character of the messages that could begin a special token; only the template's own tokens are found, and
the marks are removed again. Assistant messages may hold real `<think>` tags, which templates look for.

Foreign templates run in a bounded sandbox (`jinja.py`). That stops cheap attacks, but not every slow program, so
whoever does not trust a directory renders in a process of its own (`server/renderer.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from moestro.data.jinja import clean_text, compile_template
from moestro.data.specials import CHAT_TEMPLATE
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
_THINK_TAGS = re.compile("(</?think>)")


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation; only the template gives special tokens.

    Each message has `role` (one of `ROLES`) and `content`. `template` defaults to the tokenizer's own, else to
    `CHAT_TEMPLATE`. `variables` are further ones for the template: `tools`, `documents`, `enable_thinking`, … Raises
    `DataError` for bad messages and for templates that fail or exceed their bounds.
    """
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str | None):
            raise DataError(f"a chat message needs a role of {', '.join(ROLES)} and a content that is a string")
    given = {"tools": None, "documents": None, **(variables or {})}
    template = template or choose_template(tokenizer, has_tools=bool(given["tools"])) or CHAT_TEMPLATE
    if template == CHAT_TEMPLATE and (tokenizer.user_id is None or tokenizer.assistant_id is None):
        raise DataError("this tokenizer has no tokens for user and assistant, and brings no chat template")
    mark = _choose_mark([messages, given])
    starts = re.compile("[" + re.escape("".join(sorted({name[0] for name in tokenizer.specials if name}))) + "]")
    marked = {name: _mark_value(value, starts, mark) for name, value in given.items()}
    marked["messages"] = [_mark_message(_name_thoughts(message), starts, mark) for message in messages]
    marked["add_generation_prompt"] = add_generation_prompt
    text = _render(template, marked, tokenizer)
    return tokenizer.encode_marked(text.replace(_escape(mark), mark), mark)


def choose_template(tokenizer: Tokenizer, *, has_tools: bool) -> str | None:
    """The template for a conversation with or without tools; None if the tokenizer brings none."""
    templates = tokenizer.chat_templates
    return templates.get("tool_use", tokenizer.chat_template) if has_tools else tokenizer.chat_template


def _name_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its thoughts under each of the names that templates know."""
    thoughts = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return {**message} if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _escape(text: str) -> str:
    """As JSON in ASCII spells it."""
    return json.dumps(text)[1:-1]


def _choose_mark(values: object) -> str:
    """A string of Unicode non-characters that no value contains, nor its spelling in ASCII."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    marks = ("\ufdd0" * length + "\ufdd1" for length in count(1))
    return next(mark for mark in marks if mark not in text and _escape(mark) not in text)


def _mark_message(message: Mapping[str, Any], starts: re.Pattern[str], mark: str) -> dict[str, Any]:
    """A message with marks in all but its role, and in an assistant's content in all but its think tags."""
    marked = {key: value if key == "role" else _mark_value(value, starts, mark) for key, value in message.items()}
    if message["role"] == "assistant" and isinstance(message.get("content"), str):
        parts = _THINK_TAGS.split(message["content"])
        marked["content"] = "".join(
            part if _THINK_TAGS.fullmatch(part) else _mark_value(part, starts, mark) for part in parts
        )
    return marked


def _mark_value(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return starts.sub(lambda match: match[0] + mark, value)
    if isinstance(value, Mapping):
        return {_mark_value(key, starts, mark): _mark_value(item, starts, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark_value(item, starts, mark) for item in value]
    return value


def _render(template: str, variables: dict[str, Any], tokenizer: Tokenizer) -> str:
    parts: list[str] = []
    size = 0
    try:
        for part in compile_template(template).generate({**_special_names(tokenizer), **variables}):
            parts.append(part)
            size += len(part)
            if size > MAX_OUTPUT_CHARS:
                raise DataError(f"chat template: more than {MAX_OUTPUT_CHARS} characters of output")
    except DataError:
        raise
    except Exception as error:  # a template is a program and may fail in any way
        raise DataError(f"chat template: {clean_text(error)}") from error
    return "".join(parts)


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and so on, as the directory names them; where it names none, those that were found."""
    if tokenizer.named:
        return tokenizer.named
    names = {id: name for name, id in tokenizer.specials.items()}
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {role: names[id] for role, id in roles.items() if id in names}
