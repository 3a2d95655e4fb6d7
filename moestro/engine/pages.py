"""The pages of the cache: who holds which, and what full pages hold, for reuse. Plain Python, no tensors.

A page holds the rows of 64 tokens. A full page is registered under a digest of its token ids and the previous digest,
so that a digest stands for a whole prefix. A digest only finds a page; a page is reused only if the token ids of the
whole prefix are equal. A registered page that nobody holds stays findable until its room is needed. The page unused
longest goes first, and the end of a prefix goes before its beginning.

The rows of an MTP module also depend on the tokens that follow a position. With modules of depth d in the cache, the
key of a page is therefore its own tokens and the d after it (`lookahead`). Then the key determines all rows of the
page, and two texts that differ right after a page do not share it.
"""

from __future__ import annotations

import array
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_SIZE = 64  # tokens


@dataclass(frozen=True, eq=False, slots=True)
class Prefix:
    """The token ids that one full page depends on, and the prefix that ends before it."""

    tokens: tuple[int, ...]
    before: Prefix | None
    digest: bytes


def hash_page(tokens: Sequence[int], before: Prefix | None) -> bytes:
    """128 bits of BLAKE2 over the previous digest and the ids: collisions, forged or by chance, are out of reach."""
    return hashlib.blake2b(
        (before.digest if before else b"") + array.array("q", tokens).tobytes(), digest_size=16
    ).digest()


def is_same_prefix(one: Prefix | None, other: Prefix | None) -> bool:
    """Whether two prefixes consist of the same token ids."""
    while one is not other:
        if one is None or other is None or one.tokens != other.tokens:
            return False
        one, other = one.before, other.before
    return True


class PagePool:
    """A number of pages with reference counts, and the prefixes that full ones hold."""

    def __init__(self, num_pages: int, lookahead: int = 0) -> None:
        self.num_pages = num_pages
        self.lookahead = lookahead
        self.references = [0] * num_pages
        self._free = list(range(num_pages))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered pages that nobody holds, longest unused first
        self._page_to_prefix: dict[int, Prefix] = {}
        self._digest_to_page: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give now."""
        return len(self._free) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each. ValueError if there are too few: ask `num_available` first."""
        if count > self.num_available:
            raise ValueError(f"{count} pages wanted, {self.num_available} available")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def grow(self, num_pages: int) -> None:
        """Have this many pages from now on, at least as many as before."""
        self._free[:0] = range(num_pages - 1, self.num_pages - 1, -1)  # pages that were used before are taken first
        self.references += [0] * (num_pages - self.num_pages)
        self.num_pages = num_pages

    def release(self, pages: Sequence[int]) -> None:
        """Give up one reference to each page of a sequence, given in order."""
        for page in reversed(pages):
            if self.references[page] < 1:
                raise ValueError(f"page {page} is not held by anyone")
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self._page_to_prefix:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def hold(self, pages: Sequence[int]) -> None:
        """Take one reference to each of these pages, which `find_prefix` returned."""
        for page in pages:
            self.references[page] += 1
            self._idle.pop(page, None)

    def num_idle(self, pages: Sequence[int]) -> int:
        """How many of these pages nobody holds: holding them reduces `num_available`."""
        return sum(page in self._idle for page in pages)

    def find_prefix(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Pages with the longest known beginning of `tokens`, at most `max_tokens`; takes no references."""
        pages: list[int] = []
        before: Prefix | None = None
        for index in range(min(max_tokens, len(tokens) - self.lookahead) // PAGE_SIZE):
            ids = self._key(tokens, index)
            page = self._digest_to_page.get(hash_page(ids, before))
            if page is None:
                break
            found = self._page_to_prefix[page]
            if found.tokens != ids or not is_same_prefix(found.before, before):
                break
            pages.append(page)
            before = found
        return pages

    def register(self, pages: Sequence[int], tokens: Sequence[int], first: int) -> None:
        """Make a sequence's pages from index `first` on findable; `tokens` covers all full pages and the lookahead.

        A page whose prefix is already registered with another page stays private.
        """
        before = self._prefix_before(pages, tokens, first)
        for index in range(first, (len(tokens) - self.lookahead) // PAGE_SIZE):
            ids = self._key(tokens, index)
            before = Prefix(ids, before, hash_page(ids, before))
            if before.digest not in self._digest_to_page:
                self._digest_to_page[before.digest] = pages[index]
                self._page_to_prefix[pages[index]] = before

    def forget(self) -> None:
        """Forget all prefixes: pages in use stay held, but no other request finds them."""
        self._free += self._idle
        self._idle.clear()
        self._page_to_prefix.clear()
        self._digest_to_page.clear()

    def _key(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE + self.lookahead])

    def _prefix_before(self, pages: Sequence[int], tokens: Sequence[int], first: int) -> Prefix | None:
        """The prefix that ends with page first − 1, from the last registered page on."""
        start = first
        while start and pages[start - 1] not in self._page_to_prefix:
            start -= 1
        before = self._page_to_prefix[pages[start - 1]] if start else None
        for index in range(start, first):
            ids = self._key(tokens, index)
            before = Prefix(ids, before, hash_page(ids, before))
        return before

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._digest_to_page[self._page_to_prefix.pop(page).digest]
        return page
