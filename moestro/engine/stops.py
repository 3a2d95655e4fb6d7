"""A continuation's text as it grows: whole characters only, and up to the first stop string.

    ids -> Detokenizer -> text -> StopMatcher -> text that may be shown

Every continuation has one of each. So stop strings are matched once: readers see the text end where the engine ends it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from moestro.data.tokenizer import Tokenizer


def spell(tokenizer: Tokenizer, id: int, spelled: frozenset[int] = frozenset()) -> bytes:
    """The bytes that an id stands for in a text; empty for control tokens that are not among `spelled`."""
    if id >= tokenizer.vocab_size:
        return b""
    if tokenizer.token_bytes[id] or id in spelled:
        return tokenizer.pieces[id]
    return tokenizer.decode([id]).encode()  # an added token: its whole text if it is to be shown, else nothing


class Detokenizer:
    """Turns ids into text one by one; half a character waits for the rest. `spelled`: control tokens to show."""

    def __init__(self, tokenizer: Tokenizer, spelled: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._spelled = tokenizer, spelled
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is now complete."""
        return self._decoder.decode(spell(self._tokenizer, id, self._spelled))

    def finish(self) -> str:
        """What was held back, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def count_beginning(text: str, markers: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


class StopMatcher:
    """Ends a text before the first stop string and holds back what may begin one. `found`: the stop string, once found.

    If several begin at one place, the first in alphabetical order is found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown now."""
        if self.found is not None:
            return ""
        text = self._held + text
        found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            place, self.found = min(found)
            self._held = ""
            return text[:place]
        count = count_beginning(text, self._stops)
        self._held = text[len(text) - count :]
        return text[: len(text) - count]

    def finish(self) -> str:
        """The text that was held back but begins no stop string."""
        held, self._held = self._held, ""
        return held
