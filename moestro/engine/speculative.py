"""Several tokens a step: the model's own MTP modules draft, the model checks the drafts in one pass (V3 §2.2).

Module j combines the hidden state of depth j at position i with token i + 1 + j and predicts token i + 2 + j. It
attends to its own rows at earlier positions, which are in the same pages as the main ones. After each step,

    1. module 0, then 1, …, run from the positions that are ready to the last one computed; each module's prediction at
       the last position is a draft, and the next module's token there;
    2. for more drafts than modules, the last module goes on by itself, one position further each time; its own output
       replaces the hidden state that is not known yet.

A position is ready once all its rows come from the text and none from a draft: with d modules that takes the d tokens
after it. Rows made from drafts are rewritten when the text is known; only ready pages are shared.

Drafts use the request's own settings and random stream, and are checked as in `sampler.py`. So they cost or save time
but change no distribution. All decisions, including giving up drafting, depend on the request alone, never on a clock
or on who else runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.engine.paged_cache import PagedCache
from moestro.engine.pages import PAGE_SIZE
from moestro.engine.runtime import Runtime
from moestro.engine.sampler import Draft, Sampler
from moestro.engine.sequence import Sequence
from moestro.engine.stats import DraftCounts
from moestro.errors import MoestroError
from moestro.model.size import measure_size

WINDOW = 64  # how many checks of drafts decide whether drafting pays


@dataclass(eq=False)
class Drafting:
    """The drafting state of one sequence.

    `limit`: drafts a step. `hidden` [n, D]: the main model's, at the positions from `num_ready` to the last computed.
    `probabilities` [V]: what the sequence's drafts were drawn from.
    """

    sampler: Sampler
    limit: int
    hidden: Tensor | None = None
    probabilities: list[Tensor | None] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    off_after: int | None = None
    _recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def __post_init__(self) -> None:
        self.drafted, self.accepted = [0] * self.limit, [0] * self.limit

    def take(self, sequence: Sequence) -> list[Draft]:
        """Take the drafts to check now from the sequence."""
        drafts = list(zip(sequence.drafts, self.probabilities, strict=True))
        sequence.drafts, self.probabilities = [], []
        return drafts

    def count(self, drafted: int, accepted: int) -> None:
        """Record one check."""
        for place in range(drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < accepted
        self._recent.append((drafted, accepted))

    def pays(self, cost: float) -> bool:
        """Whether drafts gained at least the tokens of plain steps in the same time, or it is too early to tell."""
        drafted, accepted = (sum(numbers) for numbers in zip(*self._recent, strict=True)) if self._recent else (0, 0)
        return len(self._recent) < WINDOW or accepted >= cost * drafted

    def report(self) -> DraftCounts:
        """The numbers so far."""
        return DraftCounts(tuple(self.drafted), tuple(self.accepted), self.off_after)


@dataclass(eq=False)
class _Span:
    """Positions of one sequence passing through the modules: `hidden` [n, D], from position `first` on."""

    sequence: Sequence
    drafting: Drafting
    first: int
    hidden: Tensor
    known: list[int]  # the text and the drafts so far
    room: int  # how long `known` may get
    sampler: Sampler | None

    @property
    def is_drafting(self) -> bool:
        return len(self.known) < self.room


class Drafter:
    """Writes the MTP modules' rows and the drafts for all sequences of an engine.

    `cost`: what drafting and checking a draft costs, in steps of one token without drafts; see `estimate_cost`.
    """

    def __init__(self, runtime: Runtime, cache: PagedCache, cost: float) -> None:
        self.runtime = runtime
        self.cache = cache
        self.cost = cost
        self.depth = len(runtime.mtp)

    def keep(self, sequence: Sequence, drafting: Drafting, first: int, hidden: Tensor) -> None:
        """Take the main model's hidden states [n, D] at the positions from `first` on."""
        kept = drafting.hidden
        is_next = kept is not None and sequence.num_ready + len(kept) == first
        drafting.hidden = torch.cat([kept, hidden]) if kept is not None and is_next else hidden.clone()

    def run(self, work: Iterable[tuple[Sequence, Drafting, bool]]) -> list[tuple[Sequence, int]]:
        """Draft for sequences that go on (True); for the others, write rows if that completes a page.

        Returns the sequences that now have more positions ready, and how many are ready.
        """
        spans = [self._span(*item) for item in work]
        live = [span for span in spans if span is not None]
        for module in range(self.depth):
            live = self._pass(module, live)
        longest = max((span.room - len(span.sequence.tokens) for span in live), default=0)
        for _ in range(self.depth, longest):
            for span in live:
                span.first, span.hidden = span.first + len(span.hidden), span.hidden[-1:]
            live = self._pass(self.depth - 1, [span for span in live if span.is_drafting])
        return [self._finish(span) for span in spans if span is not None]

    def _span(self, sequence: Sequence, drafting: Drafting, going_on: bool) -> _Span | None:
        length, first, hidden = len(sequence.tokens), sequence.num_ready, drafting.hidden
        if hidden is None or not len(hidden):
            return None
        left = sequence.num_prompt + sequence.params.max_tokens - length - 1  # the token after the drafts is no draft
        room = min(drafting.limit, left) if going_on and drafting.off_after is None else 0
        ready = min(sequence.num_computed, length - self.depth)
        if room <= 0 and ready // PAGE_SIZE == first // PAGE_SIZE:
            return None
        sampler = drafting.sampler.fork() if room > 0 else None
        return _Span(sequence, drafting, first, hidden, sequence.tokens.copy(), length + max(room, 0), sampler)

    def _pass(self, module: int, spans: list[_Span]) -> list[_Span]:
        """Run one module over the spans as far as its tokens are known; returns those with positions left to run."""
        live, parts, hidden = [], [], []
        for span in spans:
            ahead = span.first + 1 + module
            count = min(len(span.hidden), len(span.known) - ahead)
            if count > 0:
                live.append(span)
                parts.append((span.known[ahead : ahead + count], span.first, span.sequence.pages))
                hidden.append(span.hidden[:count])
        if not live:
            return []
        step = self.cache.prepare(parts)
        out = self.runtime.forward_mtp(module, torch.cat(hidden), step, self.cache)
        ends = []
        for span, part in zip(live, out.split([len(tokens) for tokens, _, _ in parts]), strict=True):
            if len(part) == len(span.hidden) and span.is_drafting:
                ends.append(span)
            else:
                span.room = 0
            span.hidden = part
        if ends:
            for span, logits in zip(ends, self.runtime.logits(torch.stack([s.hidden[-1] for s in ends])), strict=True):
                _draft(span, logits)
        return live

    def _finish(self, span: _Span) -> tuple[Sequence, int]:
        sequence, drafting = span.sequence, span.drafting
        sequence.drafts += span.known[len(sequence.tokens) :]  # it has none yet, unless its prompt was recomputed
        ready = max(min(sequence.num_computed, len(sequence.tokens) - self.depth), sequence.num_ready)
        assert drafting.hidden is not None
        drafting.hidden = drafting.hidden[ready - sequence.num_ready :].clone()
        return sequence, ready


def _draft(span: _Span, logits: Tensor) -> None:
    """Add a draft, or end the drafts where the model's numbers or a grammar at its limits allow none."""
    sampler, num_prompt = span.sampler, span.sequence.num_prompt
    assert sampler is not None
    if not torch.isfinite(logits.sum()):
        span.room = 0
        return
    try:
        token, probabilities = sampler.propose(logits, span.known[:num_prompt], span.known[num_prompt:])
    except MoestroError:  # a grammar at its limits; if the text itself gets there, its check will report it
        span.room = 0
        return
    span.known.append(token)
    span.drafting.probabilities.append(probabilities)
    if sampler.is_finished:
        span.room = 0


def draft_reach(limit: int, depth: int) -> int:
    """How many positions past its tokens a sequence with `limit` drafts a step may write to."""
    return limit + max(limit - depth, 0)


def estimate_cost(config: ModelConfig) -> float:
    """What a draft costs, in steps that compute one token: the ratio of the weights to be read.

    Decoding few sequences takes as long as reading the weights. A step reads attention, FFN and head for its one token.
    A draft adds an MTP block and the head once more. Its check adds a second row, and the experts that the first row
    did not choose. This is an estimate, not a measurement, so that a request gives the same tokens every time.
    The model must have an MTP module.
    """
    size = measure_size(config)
    module = size.mtp_active / config.mtp_depth + config.vocab_size * config.hidden_dim
    share = config.top_k / config.num_experts if config.num_experts else 0.0
    others = size.routed * share * (1 - share)
    return (module + others) / (size.active if config.tie_embeddings else size.active_without_embedding)
