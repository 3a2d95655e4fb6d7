"""Where added tokens stand in a text, found as the `tokenizers` library finds them.

The longest content wins where several begin at one place. A token may ask for more: `single_word` that no letter or
digit touches it, `lstrip` and `rstrip` that the white space beside it belongs to it. Tokens that are matched after
normalisation come second, in what the others leave.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for itself. `special`: it is control, not text, and hidden when ids are shown as text."""

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> AddedToken:
        """From an entry of `added_tokens`; KeyError without an id or a content."""
        flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
        return cls(int(tree["id"]), str(tree["content"]), **{flag: bool(tree.get(flag)) for flag in flags})

    def as_tree(self) -> dict[str, Any]:
        """An entry of `added_tokens`."""
        return {
            "id": self.id,
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        }


class AddedTokenFinder:
    """Finds the tokens in texts."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        tokens = list(tokens)
        exact = {token.content: token for token in tokens if not token.normalized}
        normalized = {token.content: token for token in tokens if token.normalized}
        self._passes = [(_pattern_of(group), group) for group in (exact, normalized) if group]

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """The text in order: tokens, and what stands between them."""
        parts: list[str | AddedToken] = [text]
        for pattern, tokens in self._passes:
            parts = [
                new for part in parts for new in (_split(part, pattern, tokens) if isinstance(part, str) else [part])
            ]
        return (part for part in parts if part)


def _pattern_of(contents: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))


def _split(text: str, pattern: re.Pattern[str], tokens: Mapping[str, AddedToken]) -> Iterator[str | AddedToken]:
    done = 0
    for match in pattern.finditer(text):
        (start, end), token = match.span(), tokens[match[0]]
        before, after = text[done:start], text[end:]
        if token.single_word and (_is_word(text[:start][-1:]) or _is_word(after[:1])):
            continue
        yield before.rstrip() if token.lstrip else before
        yield token
        done = end + (len(after) - len(after.lstrip()) if token.rstrip else 0)
    yield text[done:]


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
