"""Many requests at once: continuous batching over the paged latent cache.

    step() = schedule → run → sample, or check drafts → draft

Every step computes one packed batch: a token of each decoding sequence with the drafts that may follow it
(`speculative.py`), and chunks of prompts. Each sequence attends over its own pages. Rows of a batch do not depend on
each other (`runtime.py`). So a request's tokens and log-probabilities are, bit for bit, those it would get alone,
whatever shares its batch, however its prompt is cut into chunks, wherever its prefix comes from, and however often it
is preempted. An engine belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import isfinite

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.data.tokenizer import Tokenizer
from moestro.engine.continuation import Continuation, begin_continuation, score_token
from moestro.engine.events import Completion, Event
from moestro.engine.grammar import GrammarCompiler
from moestro.engine.paged_cache import PagedCache, count_moe_layers, free_bytes, plan_room
from moestro.engine.pages import PagePool
from moestro.engine.runtime import Runtime
from moestro.engine.scheduler import Row, Scheduler, pages_for
from moestro.engine.sequence import MAX_DRAFT_TOKENS, Request, Sequence
from moestro.engine.speculative import Drafter, draft_reach, estimate_cost
from moestro.engine.stats import Counters, EngineStats
from moestro.errors import ConfigError, MoestroError
from moestro.model.transformer import Transformer

SCORED_ROWS = 64  # prompt rows scored at a time: their logits over the whole vocabulary are large


@dataclass(frozen=True)
class Computed:
    """A row's tokens from position `first` on, which are rows `start` … of the step: hidden [n, D], ids [n, L, A].

    If they are the row's last tokens, there are also `logits` [1 + drafts, V] fp32 and the likeliest token of each, or
    None where logits are not finite.
    """

    row: Row
    first: int
    start: int
    step_hidden: Tensor
    step_routes: Tensor
    logits: Tensor
    likeliest: list[int | None]

    @property
    def hidden(self) -> Tensor:
        return self.step_hidden[self.start : self.start + self.row.count]

    @property
    def routes(self) -> Tensor:
        return self.step_routes[self.start : self.start + self.row.count]


class Engine:
    """Serves the requests of one model; `stop_ids` end every text. Drive it by `run`, `stream`, or `add` and `step`.

    The cache takes `memory_bytes`, by default half of the free memory; `cache` is auto or fp8 (None: the runtime's).
    A prompt and its continuation have at most `max_context` tokens (None: as many as fit and the model takes). With
    `grows`, the cache holds what the requests so far could need at the same time, instead of all that it may take.
    A step computes at most `token_budget` tokens (None: see `Scheduler`) of at most `max_running` sequences;
    `max_waiting` more may queue.
    `draft_tokens`: how many tokens the model's MTP modules draft a step for each sequence, 0 for none; None: one, if
    the model has MTP modules. A sequence whose drafts do not pay stops drafting; `draft_cost` is what a draft costs,
    in steps without drafts (None: `speculative.estimate_cost`).

    ConfigError if the cache is too small or fp8 without latents, or for drafts without MTP modules.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        *,
        memory_bytes: int | None = None,
        cache: str | None = None,
        max_context: int | None = None,
        grows: bool = False,
        token_budget: int | None = None,
        max_running: int = 64,
        max_waiting: int = 1024,
        draft_tokens: int | None = None,
        draft_cost: float | None = None,
    ) -> None:
        self.runtime, self.tokenizer, self.stop_ids = runtime, tokenizer, stop_ids
        config = runtime.config
        self.draft_tokens = min(1, config.mtp_depth) if draft_tokens is None else draft_tokens
        check_model(config, self.draft_tokens)
        kind = runtime.cache if cache is None else cache
        num_bytes = free_bytes(runtime.mapped_bytes) if memory_bytes is None else memory_bytes
        self.room = plan_room(config, runtime.dtype, max_running, num_bytes, kind, max_context)
        self.grows, num_pages = grows, 0 if grows else self.room.num_pages
        self.cache = PagedCache(config, num_pages, runtime.dtype, kind, context=self.room.context)
        self.drafter: Drafter | None = None
        if self.draft_tokens:
            cost = estimate_cost(config) if draft_cost is None else draft_cost
            self.drafter = Drafter(runtime, self.cache, cost)
        self.scheduler = Scheduler(
            PagePool(num_pages, lookahead=config.mtp_depth if self.draft_tokens else 0),
            token_budget=token_budget,
            max_running=max_running,
            max_waiting=max_waiting,
            draft_tokens=self.draft_tokens,
        )
        loads = torch.zeros(count_moe_layers(config), config.num_experts, dtype=torch.int64)
        self._counters = Counters(loads, [0] * self.draft_tokens, [0] * self.draft_tokens)
        self._continuations: dict[Sequence, Continuation] = {}
        self._requests: dict[int, list[Sequence]] = {}
        self._streams: dict[int, deque[Event]] = {}  # what `stream` has yet to yield, by request
        self._unclaimed: list[Event] = []  # computed while serving a stream; the next `step` returns them
        self._num_requests = self._num_sequences = self._num_updates = 0

    @property
    def has_work(self) -> bool:
        """Whether there is anything to compute or return."""
        return bool(self._unclaimed) or self.scheduler.has_work

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs or waits, and no page of the cache is held."""
        pool = self.scheduler.pool
        return not self.has_work and pool.num_available == pool.num_pages

    @property
    def capacity(self) -> int:
        """How many sequences may run and wait."""
        return self.scheduler.max_running + self.scheduler.max_waiting

    @property
    def running_ids(self) -> frozenset[int]:
        """The requests that have a running sequence."""
        return frozenset(sequence.request_id for sequence in self.scheduler.running)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """The compiler, made when first needed because it reads the whole vocabulary."""
        return GrammarCompiler(self.tokenizer, self.runtime.config.vocab_size, self.stop_ids)

    def stats(self) -> EngineStats:
        """The engine's current statistics; the tensor is a copy."""
        scheduler, counters = self.scheduler, self._counters
        counters.settle()
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=scheduler.pool.num_pages - scheduler.pool.num_available,
            pages=scheduler.pool.num_pages,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            prefix_hit_tokens=scheduler.num_prefix_tokens,
            drafted=counters.drafted.copy(),
            accepted=counters.accepted.copy(),
            speculation_off=counters.speculation_off,
            loads=counters.loads.clone(),
        )

    def add(self, request: Request) -> int:
        """Queue a request and return its id. ConfigError if it can never run, QueueFullError if too many wait."""
        self.check(request)
        params, prompt, request_id = request.params, list(request.prompt), self._num_requests
        self.scheduler.require_room(params.n)
        grammar = None if params.grammar is None else self.grammars.compile(params.grammar)
        limit = self.draft_tokens if params.draft_tokens is None else params.draft_tokens
        reach = draft_reach(limit, self.runtime.config.mtp_depth)
        sequences = [
            Sequence(self._num_sequences + i, request_id, i, params, prompt.copy(), len(prompt), ahead=reach)
            for i in range(params.n)
        ]
        self.scheduler.add(sequences)
        self._make_room(sequences)
        for sequence in sequences:
            begun = begin_continuation(sequence, self.tokenizer, self.stop_ids, grammar, limit)
            self._continuations[sequence] = begun
        self._requests[request_id] = sequences
        self._num_requests += 1
        self._num_sequences += len(sequences)
        return request_id

    def check(self, request: Request) -> None:
        """Raise ConfigError for a request that can never run."""
        config, params, prompt = self.runtime.config, request.params, request.prompt
        total = len(prompt) + params.max_tokens
        if not prompt:
            raise ConfigError("the prompt is empty")
        if total > self.room.context:
            raise ConfigError(
                f"prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) exceed "
                f"the context of {self.describe_context()}",
                hint="--max-tokens and --max-context set both",
            )
        if params.n > self.scheduler.max_waiting:
            raise ConfigError(f"n={params.n} continuations exceed the queue of {self.scheduler.max_waiting}")
        if (params.draft_tokens or 0) > self.draft_tokens:
            raise ConfigError(f"draft_tokens={params.draft_tokens} exceeds the engine's {self.draft_tokens}")
        ids = [*prompt, *params.logit_bias]
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise ConfigError(f"prompt or logit_bias name token ids outside the vocabulary of {config.vocab_size}")

    def describe_context(self) -> str:
        """The most tokens of a sequence in words, and what limits them."""
        context, longest = self.room.context, self.runtime.config.max_seq_len
        if context == longest:
            return f"{context} tokens, the model's own maximum"
        return f"{context} tokens, as limited here: the model itself takes {longest}"

    def abort(self, request_id: int) -> bool:
        """Drop a request between two steps, without an event; False if it has already ended."""
        self._unclaimed = [event for event in self._unclaimed if event.request_id != request_id]
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self._forget(sequence)
        return bool(sequences)

    def update(self, model: Transformer) -> None:
        """Take the weights of another model of the same configuration, in place, and forget every cached prefix.

        ConfigError while requests run or wait, and for what `Runtime.update` refuses; then nothing changes.
        """
        if self.has_work:
            raise ConfigError("weights cannot be updated while requests run: finish or abort them first")
        self.runtime.update(model)
        self._follow_updates()

    def step(self) -> list[Event]:
        """Compute one batch and return its tokens; decoding sequences come in order of arrival.

        Tokens of streamed requests go to their streams instead.
        """
        computed = self._step()
        events, self._unclaimed = self._unclaimed, []
        for event in computed:
            self._streams.get(event.request_id, events).append(event)
        return events

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Yield the events of one request; the engine steps whenever there is no event to yield.

        Several streams may be read in turn: a step serves all of them. Closing a stream drops its request.
        """
        request_id, left = self.add(request), request.params.n
        events = self._streams[request_id] = deque()
        try:
            while left:
                while not events:
                    self._unclaimed = self.step()
                event = events.popleft()
                left -= event.finish_reason is not None
                yield event
        finally:
            del self._streams[request_id]
            self.abort(request_id)

    def run(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """Serve requests to the end; returns the n completions of each, in order."""
        waiting, ids = deque(requests), []
        completions: dict[int, list[Completion]] = {}
        while waiting or self.has_work:
            while waiting and len(self.scheduler.waiting) + waiting[0].params.n <= self.scheduler.max_waiting:
                request = waiting.popleft()
                ids.append(self.add(request))
                completions[ids[-1]] = [Completion() for _ in range(request.params.n)]
            for event in self.step():
                completions[event.request_id][event.index].add(event)
        return [completions[request_id] for request_id in ids]

    def _step(self) -> list[Event]:
        self._follow_updates()
        rows = self.scheduler.schedule()
        if not rows:
            return []
        events, going_on, ended = list[Event](), set[Sequence](), list[Sequence]()
        with torch.inference_mode():
            parts = self._run(rows)
            for part in parts:
                sequence, found = part.row.sequence, self._continue(part)
                events += found
                if found and found[-1].finish_reason:
                    ended.append(sequence)
                elif found:
                    going_on.add(sequence)
            self._make_ready(parts, going_on)
        for sequence in ended:
            self._forget(sequence)
        return events

    def _follow_updates(self) -> None:
        """Forget what was computed with other weights, whoever updated them; MoestroError amid a request."""
        if self._num_updates != self.runtime.num_updates:
            if any(sequence.num_computed or sequence.num_generated for sequence in self._continuations):
                raise MoestroError("the model's weights were updated while requests were running")
            self.scheduler.pool.forget()
            self._num_updates = self.runtime.num_updates

    def _run(self, rows: list[Row]) -> list[Computed]:
        """Compute the rows' tokens and drafts and the logits of the last ones, and score prompts on the way."""
        inputs = []
        for row in rows:
            sequence, first = row.sequence, row.sequence.num_computed
            tokens = (sequence.tokens[first:] + sequence.drafts)[: row.count]
            inputs.append((tokens, first, sequence.pages))
        step = self.cache.prepare(inputs)
        output = self.runtime.forward(step, self.cache)
        routes = output.ids.transpose(0, 1).to(torch.int16)
        self.cache.write_routes(step.slots, routes)
        self._counters.add_routes(routes)
        wanted = [1 + len(row.sequence.drafts) if row.is_last else 0 for row in rows]
        starts = list(accumulate((row.count for row in rows), initial=0))
        last = [n for end, count in zip(starts[1:], wanted, strict=True) for n in range(end - count, end)]
        hidden = output.hidden if len(last) == starts[-1] else output.hidden[last]
        logits = self.runtime.logits(hidden) if last else hidden
        likeliest = find_likeliest(logits) if last else []
        parts, done = [], 0
        for row, (_, first, _), start, count in zip(rows, inputs, starts, wanted, strict=False):
            own = slice(done, done := done + count)
            parts.append(Computed(row, first, start, output.hidden, routes, logits[own], likeliest[own]))
        return parts

    def _score_prompt(self, part: Computed) -> None:
        """Score the prompt tokens that follow the row's tokens, each only once even after preemption."""
        sequence = part.row.sequence
        scores, count = self._continuations[sequence].prompt_logprobs, sequence.params.prompt_logprobs
        assert count is not None
        stop = min(part.row.count, sequence.num_prompt - 1 - part.first)
        # rows before the first were scored when they were first computed
        for start in range(len(scores) - part.first, stop, SCORED_ROWS):
            for logits in self.runtime.logits(part.hidden[start : min(start + SCORED_ROWS, stop)]):
                scores.append(score_token(logits, sequence.tokens[len(scores) + 1], count))

    def _continue(self, part: Computed) -> list[Event]:
        """Add the tokens that follow a row: every draft up to the first wrong one, and one more token."""
        row, sequence = part.row, part.row.sequence
        if sequence.params.prompt_logprobs is not None:
            self._score_prompt(part)
        self.scheduler.commit(row)
        if not part.likeliest:
            return []
        if not sequence.num_generated:
            self._counters.prompt_tokens += sequence.num_prompt
        continuation = self._continuations[sequence]
        drafts = continuation.drafting.take(sequence)
        wants = sequence.params.return_routes
        routes = part.routes[-len(part.likeliest) :] if wants else [None] * len(part.likeliest)
        events: list[Event] = []
        for i, (draft, ids) in enumerate(zip([*drafts, None], routes, strict=True)):
            event = continuation.extend(part.logits[i], part.likeliest[i], draft, ids)
            events.append(event)
            self._counters.generated_tokens += event.token is not None
            if event.finish_reason or draft is None or event.token != draft[0]:
                break
            sequence.num_computed += 1
        num_right = sum(draft[0] == event.token for draft, event in zip(drafts, events, strict=False))
        self._count_drafts(continuation, len(drafts), num_right)
        if events[-1].finish_reason:
            events[-1] = self._report(continuation, events[-1])
        return events

    def _count_drafts(self, continuation: Continuation, drafted: int, accepted: int) -> None:
        """Record a check of drafts, and stop drafting if it no longer pays."""
        drafting, sequence = continuation.drafting, continuation.sequence
        if self.drafter is None or not drafting.limit:
            return
        if drafted:
            drafting.count(drafted, accepted)
            self._counters.add_drafts(drafted, accepted)
        if drafting.off_after is None and not drafting.pays(self.drafter.cost):
            drafting.off_after = sequence.num_generated
            sequence.ahead = 0
            self._counters.speculation_off += 1

    def _report(self, continuation: Continuation, event: Event) -> Event:
        """A continuation's last event, completed with what is reported about the whole continuation."""
        sequence, drafting = continuation.sequence, continuation.drafting
        wants_routes, drafts = sequence.params.return_routes, self.drafter is not None and drafting.limit > 0
        return replace(
            event,
            routes=self.cache.read_routes(sequence.pages, sequence.num_computed) if wants_routes else None,
            drafts=drafting.report() if drafts else None,
        )

    def _make_ready(self, parts: list[Computed], going_on: set[Sequence]) -> None:
        """Let the MTP modules follow the text and draft for sequences that continue; make full pages findable."""
        ready = [(part.row.sequence, part.row.sequence.num_computed) for part in parts]
        if self.drafter is not None:
            work = []
            for part in parts:
                sequence, drafting = part.row.sequence, self._continuations[part.row.sequence].drafting
                self.drafter.keep(sequence, drafting, part.first, part.hidden[: sequence.num_computed - part.first])
                work.append((sequence, drafting, sequence in going_on))
            ready = self.drafter.run(work)
        for sequence, count in ready:
            self.scheduler.mark_ready(sequence, count)

    def _make_room(self, sequences: list[Sequence]) -> None:
        """Let a cache that grows hold everything that the requests under way and these could come to need."""
        longest = [s.num_prompt + s.params.max_tokens for s in (*self._continuations, *sequences)]
        wanted = min(sum(map(pages_for, longest)), self.room.num_pages)
        if self.grows and wanted > self.scheduler.pool.num_pages:
            self.cache.grow(wanted)
            self.scheduler.pool.grow(wanted)

    def _forget(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self._continuations[sequence]
        left = self._requests[sequence.request_id]
        left.remove(sequence)
        if not left:
            del self._requests[sequence.request_id]


def check_model(config: ModelConfig, draft_tokens: int) -> None:
    """Raise ConfigError for a model that no engine can serve."""
    if not 0 <= draft_tokens <= MAX_DRAFT_TOKENS:
        raise ConfigError(f"draft_tokens must lie between 0 and {MAX_DRAFT_TOKENS}, not {draft_tokens}")
    if draft_tokens and not config.mtp_depth:
        raise ConfigError(f"draft_tokens={draft_tokens}, but this model has no MTP modules that could draft")


def find_likeliest(logits: Tensor) -> list[int | None]:
    """logits [N, V] -> the token with the largest logit of each row, None where a row is not all finite."""
    sums, tokens = logits.sum(-1).tolist(), logits.argmax(-1).tolist()
    return [token if isfinite(total) else None for token, total in zip(tokens, sums, strict=True)]
