"""A continuation's text as it grows: whole characters only, and up to the first stop string.

    ids -> Detokenizer -> text -> StopMatcher -> text that may be shown

Every continuation has one of each. So stop strings are matched once: where the engine ends a text is where its
readers see it end.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from moestro.data.tokenizer import Tokenizer


def spell(tokenizer: Tokenizer, id: int, spelled: frozenset[int] = frozenset()) -> bytes:
    """The bytes that an id stands for in a text; none for control tokens, unless they are among those `spelled`."""
    if id >= tokenizer.vocab_size:
        return b""
    if tokenizer.token_bytes[id] or id in spelled:
        return tokenizer.pieces[id]
    return tokenizer.decode([id]).encode()  # an added token: whole text if it is to be seen, else nothing


class Detokenizer:
    """Text of one id after the other; half a character waits for the rest. `spelled`: control tokens to be shown."""

    def __init__(self, tokenizer: Tokenizer, spelled: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._spelled = tokenizer, spelled
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """What is whole now."""
        return self._decoder.decode(spell(self._tokenizer, id, self._spelled))

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


class StopMatcher:
    """Ends a text before the first stop string, and holds back what may begin one. `found`: the string, once it came.

    Of several that begin at one place the first in the alphabet is found.
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
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held
