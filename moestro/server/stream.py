"""Prepares the engine's text for sending: splits thoughts from the answer, and writes server-sent events.

text -> Splitter -> (kind, text)
JSON -> sse -> bytes
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from moestro.data.specials import THINK, THINK_END
from moestro.engine.stops import count_beginning

Kind = Literal["reasoning", "content"]


@dataclass
class Splitter:
    """Splits thoughts, between `<think>` and `</think>` at the beginning of a text, from the answer.

    `kind` is where the text begins: None where a `<think>` may or may not come first.
    """

    kind: Kind | None = None
    _held: str = field(default="", init=False)
    _is_fresh: bool = field(default=True, init=False)  # no text of this kind was given yet
    _follows_thoughts: bool = field(default=False, init=False)

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """The parts that are settled."""
        text, self._held = self._held + text, ""
        if self.kind is None:
            stripped = text.lstrip()
            if THINK.startswith(stripped) and stripped != THINK:
                self._held = text
                return []
            self.kind = "reasoning" if stripped.startswith(THINK) else "content"
            text = stripped.removeprefix(THINK) if self.kind == "reasoning" else text
        if self.kind == "content":
            return self._give(text)
        thought, end, answer = text.partition(THINK_END)
        if not end:
            count = count_beginning(text, [THINK_END])
            self._held = text[len(text) - count :]
            return self._give(text[: len(text) - count])
        found = self._give(thought)
        self.kind, self._is_fresh, self._follows_thoughts = "content", True, True
        return found + self._give(answer)

    def finish(self) -> list[tuple[Kind, str]]:
        """The text that was held back."""
        held, self._held = self._held, ""
        self.kind = self.kind or "content"
        return self._give(held)

    def _give(self, text: str) -> list[tuple[Kind, str]]:
        """The text without white space next to the tags, which belongs to neither part."""
        assert self.kind is not None
        if self._is_fresh and (self.kind == "reasoning" or self._follows_thoughts):
            text = text.lstrip()
        self._is_fresh = self._is_fresh and not text
        return [(self.kind, text)] if text else []


def sse(tree: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event, with a name if it has one."""
    data = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return (f"event: {event}\n".encode() if event else b"") + b"data: " + data + b"\n\n"


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
