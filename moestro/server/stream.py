"""Tokens to text as it is sent: whole characters only, nothing that may begin a stop string, thoughts apart.

ids -> Detokenizer -> text -> StopFilter -> text -> Splitter -> (kind, text)
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moestro.data.specials import THINK, THINK_END
from moestro.data.tokenizer import Tokenizer

Kind = Literal["reasoning", "content"]


def spell(tokenizer: Tokenizer, id: int, shown: frozenset[int] = frozenset()) -> bytes:
    """The bytes that an id stands for in an answer; none for control tokens, unless they are among those `shown`."""
    if id >= tokenizer.vocab_size:
        return b""
    if tokenizer.token_bytes[id] or id in shown:
        return tokenizer.pieces[id]
    return tokenizer.decode([id]).encode()  # an added token: whole text if it is to be seen, else nothing


class Detokenizer:
    """Text of one id after the other; half a character waits for the rest. `shown`: control tokens to be spelled."""

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """What is whole now."""
        return self._decoder.decode(spell(self._tokenizer, id, self._shown))

    def finish(self) -> str:
        """What was held back, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def count_beginning(text: str, markers: Iterable[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


class StopFilter:
    """Cuts a text before the first stop string, and holds back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._has_stopped = False

    def push(self, text: str) -> str:
        """What may be sent now."""
        if self._has_stopped:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._has_stopped, self._held = True, ""
            return text[: min(places)]
        count = count_beginning(text, self._stops)
        self._held = text[len(text) - count :]
        return text[: len(text) - count]

    def finish(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held


@dataclass
class Splitter:
    """Thoughts between `<think>` and `</think>` at the beginning of a text, apart from the answer.

    `kind` is where the text begins: None where a `<think>` may or may not come first.
    """

    kind: Kind | None = None
    _held: str = field(default="", init=False)
    _is_fresh: bool = field(default=True, init=False)  # nothing of this kind was given yet
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
        """What was held back."""
        held, self._held = self._held, ""
        self.kind = self.kind or "content"
        return self._give(held)

    def _give(self, text: str) -> list[tuple[Kind, str]]:
        """White space between the tags and what they enclose belongs to neither."""
        assert self.kind is not None
        if self._is_fresh and (self.kind == "reasoning" or self._follows_thoughts):
            text = text.lstrip()
        self._is_fresh = self._is_fresh and not text
        return [(self.kind, text)] if text else []


def sse(tree: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
