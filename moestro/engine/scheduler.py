"""What to compute in the next step: decisions over counts and pages alone, no tensors.

    1. decoding sequences with their drafts, in order of arrival, with a new page when one is full; when no page is
       left, the sequence that arrived last gives up its pages and is computed again later
    2. prompts under way, in order of arrival, in chunks, as far as the token budget still allows
    3. waiting sequences, first come first served, while there are pages for all of their tokens

Running sequences have always arrived before waiting ones, so the oldest can take any page: everything finishes.

Drafts are never dropped for lack of pages or budget. At a temperature that would change the tokens drawn (not their
distribution), and those must not depend on who else runs. So a step has room for all running sequences with drafts,
and drafts survive preemption.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from moestro.engine.pages import PAGE_SIZE, PagePool
from moestro.engine.sequence import Sequence
from moestro.errors import ConfigError, MoestroError

LEAST_BUDGET = 512  # tokens of a step


class QueueFullError(MoestroError):
    """Too many requests are already waiting; try again later."""


@dataclass(frozen=True)
class Row:
    """Compute the next `count` pending tokens of a sequence; drafts come together, with the token before them."""

    sequence: Sequence
    count: int

    @property
    def is_last(self) -> bool:
        """Whether nothing is pending afterwards: the logits of the last token choose the next, or check the drafts."""
        return self.count == self.sequence.num_pending


def pages_for(num_tokens: int) -> int:
    """How many pages hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_SIZE)


class Scheduler:
    """The waiting and the running sequences of a pool of pages, both in order of arrival.

    By default a step takes at most 512 tokens, or twice what it decodes if that is more, so that prompts have room.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        token_budget: int | None = None,
        max_running: int = 64,
        max_waiting: int = 1024,
        draft_tokens: int = 0,
    ) -> None:
        decoded = max_running * (1 + draft_tokens)
        if token_budget is None:
            token_budget = max(LEAST_BUDGET, 2 * decoded)
        if not 1 <= decoded <= token_budget:
            drafts = f" with {draft_tokens} drafts each" if draft_tokens else ""
            raise ConfigError(f"a step of {token_budget} tokens cannot decode {max_running} sequences{drafts}")
        self.pool = pool
        self.token_budget = token_budget
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_tokens = 0  # found in the cache when sequences began

    @property
    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.waiting or self.running)

    def require_room(self, count: int) -> None:
        """Raise QueueFullError if `count` more sequences cannot wait."""
        if len(self.waiting) + count > self.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests wait already, of at most {self.max_waiting}")

    def add(self, sequences: list[Sequence]) -> None:
        """Queue all sequences of one request. QueueFullError if they do not all fit; then none is queued."""
        self.require_room(len(sequences))
        self.waiting.extend(sequences)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted; its pages stay findable."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_up_pages(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Row]:
        """The rows of the next step, at most `token_budget` tokens; empty only if there is no work."""
        rows = self._decode()
        left = self.token_budget - sum(row.count for row in rows)
        for sequence in [s for s in self.running if s.is_prefilling]:
            left = self._prefill(sequence, left, rows)
        while left and self._admit():
            left = self._prefill(self.running[-1], left, rows)
        return rows

    def commit(self, row: Row) -> None:
        """Count the tokens that a row has computed; its drafts are counted when they are accepted."""
        sequence = row.sequence
        sequence.num_computed += row.count - (len(sequence.drafts) if row.is_last else 0)

    def mark_ready(self, sequence: Sequence, count: int) -> None:
        """Make newly full pages findable: the first `count` positions have their rows in all layers."""
        first, full = sequence.num_ready // PAGE_SIZE, count // PAGE_SIZE
        sequence.num_ready = count
        if full > first:
            self.pool.register(sequence.pages, sequence.tokens[: full * PAGE_SIZE + self.pool.lookahead], first)

    def _decode(self) -> list[Row]:
        rows = []
        for sequence in [s for s in self.running if not s.is_prefilling]:
            wanted = max(pages_for(sequence.num_positions) - len(sequence.pages), 0)
            while wanted > self.pool.num_available and sequence in self.running:
                self._preempt()
            if sequence in self.running:
                sequence.pages += self.pool.allocate(wanted)
                rows.append(Row(sequence, sequence.num_pending))
        return rows

    def _prefill(self, sequence: Sequence, left: int, rows: list[Row]) -> int:
        """Add a chunk of at most `left` tokens; returns how many are then left."""
        count = sequence.num_pending
        if count > left:  # one token stays with the drafts
            count = min(left, count - len(sequence.drafts) - 1)
        if count:
            rows.append(Row(sequence, count))
        return left - count

    def _admit(self) -> bool:
        """Run the first waiting sequence if there are pages for all its tokens, so that prefill never lacks any."""
        if not self.waiting or len(self.running) == self.max_running:
            return False
        sequence, pool = self.waiting[0], self.pool
        length = len(sequence.tokens)
        # the last token is always computed: its logits choose the next one
        known = pool.find_prefix(sequence.tokens, length - 1) if sequence.reads_prefixes else []
        wanted = pages_for(sequence.num_positions) - len(known)
        if wanted > pool.num_available - pool.num_idle(known):
            return False
        pool.hold(known)
        sequence.pages = known + pool.allocate(wanted)
        sequence.num_computed = sequence.num_ready = len(known) * PAGE_SIZE
        if not sequence.num_prefill:
            sequence.num_cached = sequence.num_computed
            self.num_prefix_tokens += sequence.num_cached
        sequence.num_prefill = length
        self.running.append(self.waiting.popleft())
        return True

    def _preempt(self) -> None:
        """Take the pages of the running sequence that arrived last; it waits at the head of the queue."""
        sequence = self.running.pop()
        self._give_up_pages(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _give_up_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_ready = [], 0, 0
