"""One record of a JSON, CSV, Parquet or Arrow file, or of a data set, to plain text.

A record is a string, or has its text in the field that the user names, else in `text` or `content`. Conversations are
joined as turns, each `Name: text`, with blank lines between them:

    {"messages": [{"role": "user", "content": …}, …]}            User: …  Assistant: …  System: …
    {"conversations": [{"from": "human", "value": …}, …]}        ShareGPT: human is User, gpt is Assistant
    {"instruction": …, "input": …, "output": …}                  Alpaca: User: instruction and input, Assistant: output
    {"prompt": …, "completion": …}                               the two texts, one after the other

This is pre-training on the text of conversations: every token counts, and no chat tokens are put between turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.errors import DataError
from moestro.terminal import printable

TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion")
FIELDS = (*TEXT_FIELDS, *CHAT_FIELDS, "domain")
_SPEAKERS = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant", "system": "System"}
_FORMS = "expected a 'text' (or 'content') that is a string, or a conversation"
_SHOWN = 8


def read_text(record: Any, place: str, text_field: str = "") -> tuple[str, bool]:
    """The text of a record and whether it was a conversation; "" for a field that is null.

    Raises `DataError` for a record without text, naming the fields that it has.
    """
    if isinstance(record, str):
        return record, False
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: {_FORMS}")
    for name in (text_field,) if text_field else TEXT_FIELDS:
        if name in record and isinstance(record[name], str | None):
            return record[name] or "", False
    text = None if text_field else _join_conversation(record, place)
    if text is None:
        wanted = f"expected a '{text_field}' that is a string" if text_field else _FORMS
        raise DataError(f"{place}: {wanted}; its fields are {_list_names(record)} (data.text_field names one)")
    return text, True


def _join_conversation(record: Mapping[str, Any], place: str) -> str | None:
    for name, role, value in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(record.get(name), list):
            return "\n\n".join(_join_turn(turn, role, value, f"{place}, {name}") for turn in record[name]) + "\n"
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        asked = [part for part in (record["instruction"], record.get("input")) if isinstance(part, str) and part]
        return f"User: {chr(10).join(asked)}\n\nAssistant: {record['output']}\n"
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return str(record["prompt"] + record["completion"])
    return None


def _join_turn(turn: Any, role: str, value: str, place: str) -> str:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: expected turns with '{role}' and '{value}'")
    if role not in turn and "role" in turn:  # some write one form under the other's name
        role, value = "role", "content"
    elif role not in turn and "from" in turn:
        role, value = "from", "value"
    speaker, said = turn.get(role), turn.get(value)
    if isinstance(said, list):  # parts, of which those of text are read
        said = "".join(part["text"] for part in said if isinstance(part, Mapping) and isinstance(part.get("text"), str))
    if not isinstance(speaker, str) or not isinstance(said, str | None):
        raise DataError(f"{place}: expected turns with '{role}' and '{value}'")
    return f"{_SPEAKERS.get(speaker, speaker.capitalize())}: {said or ''}"


def _list_names(record: Mapping[str, Any]) -> str:
    names = [printable(str(name), 40) for name in record]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") or "none"
