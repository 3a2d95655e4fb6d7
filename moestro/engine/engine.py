"""Many requests at once: continuous batching over the paged latent cache.

    step() = schedule → run → sample, or check drafts → draft

Every step computes one packed batch: a token of each decoding sequence with the drafts that may follow it
(`speculative.py`), and chunks of prompts, each sequence attending over its own pages. Rows of a batch do not depend on
each other (`runtime.py`), so that a request's tokens and log-probabilities are, bit for bit, those it would get alone:
whatever shares its batch, however its prompt is cut into chunks, wherever its prefix comes from, and however often it
is preempted. An engine belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import isfinite
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.engine.grammar import GrammarCompiler, Matcher
from moestro.engine.paged_cache import PagedCache, count_moe_layers, count_pages
from moestro.engine.pages import PagePool
from moestro.engine.sampler import Draft, Sampler
from moestro.engine.scheduler import Row, Scheduler, pages_for
from moestro.engine.sequence import MAX_DRAFT_TOKENS, Request, SamplingParams, Sequence
from moestro.engine.speculative import Drafter, Drafting, draft_reach, estimate_cost
from moestro.engine.stats import Counters, DraftCounts, EngineStats
from moestro.errors import ConfigError, MoestroError
from moestro.model.transformer import Transformer

if TYPE_CHECKING:
    from moestro.engine.language_model import LanguageModel

FinishReason = Literal["stop", "length", "error"]
SCORED_ROWS = 64  # of a prompt at a time: their logits over the whole vocabulary are large


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability by the model alone, in nats, and the likeliest tokens (id, logprob) in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """One more token of a continuation, and with the last one why it ends.

    A step may bring several of one continuation, in order. `token` is None where a prompt was only computed, or where
    the request failed: `error` says how. `stop_string` is the one found in the text. `token_routes` [MoE layers, top_k]
    int16 are the experts of the token before this one, from which it follows; only if the request wants routes.

    With the first event come `prompt_logprobs`, of every prompt token but the first. With the last one come `drafts`,
    if the sequence was to draft, and `routes` [tokens, MoE layers, top_k] int16, of every token that was computed: the
    last one of the continuation was not.
    """

    request_id: int
    index: int
    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    routes: Tensor | None = None
    token_routes: Tensor | None = None
    drafts: DraftCounts | None = None
    error: str | None = None


@dataclass
class Completion:
    """The events of one continuation, put together."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    routes: Tensor | None = None
    drafts: DraftCounts | None = None
    error: str | None = None

    def add(self, event: Event) -> None:
        """Take over what an event brings."""
        self.ids += [] if event.token is None else [event.token]
        self.logprobs += [] if event.logprob is None else [event.logprob]
        self.finish_reason, self.stop_string, self.routes = event.finish_reason, event.stop_string, event.routes
        self.drafts, self.error = event.drafts, event.error
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs


@dataclass(frozen=True)
class Choice:
    """What was chosen for a place: no token where the request wants none, or where `error` says why not."""

    token: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None


@dataclass
class Progress:
    """What the engine keeps of a sequence beside its tokens."""

    sampler: Sampler
    drafting: Drafting
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Computed:
    """A row's tokens from position `first` on, which are rows `start` … of the step: hidden [n, D], ids [n, L, A].

    If they are the last ones, logits [1 + drafts, V] fp32, of each the likeliest token or None where numbers are not
    finite; none otherwise.
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
    """Serves the requests of one model. The cache takes `memory_bytes`, by default half of the free memory.

    A step computes at most `token_budget` tokens of at most `max_running` sequences; `max_waiting` more may queue.
    `draft_tokens`: how many the model's MTP modules draft a step for each sequence, 0 for none; None: one, if it has
    such modules. A sequence whose drafts do not pay stops drafting; `draft_cost` is what a draft costs in steps without
    any (None: `speculative.estimate_cost`).

    ConfigError for a cache that is too small, and for drafts without modules.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        memory_bytes: int | None = None,
        token_budget: int = 512,
        max_running: int = 64,
        max_waiting: int = 1024,
        draft_tokens: int | None = None,
        draft_cost: float | None = None,
    ) -> None:
        self.runtime, self.tokenizer = language_model.runtime, language_model.tokenizer
        self.stop_ids = language_model.stop_ids
        config = self.runtime.config
        self.draft_tokens = min(1, config.mtp_depth) if draft_tokens is None else draft_tokens
        check_model(config, self.draft_tokens)
        num_pages = count_pages(config, self.runtime.dtype, max_running, memory_bytes)
        self.cache = PagedCache(config, num_pages, self.runtime.dtype)
        self.drafter: Drafter | None = None
        if self.draft_tokens:
            cost = estimate_cost(config) if draft_cost is None else draft_cost
            self.drafter = Drafter(self.runtime, self.cache, cost)
        self.scheduler = Scheduler(
            PagePool(num_pages, lookahead=config.mtp_depth if self.draft_tokens else 0),
            token_budget=token_budget,
            max_running=max_running,
            max_waiting=max_waiting,
            draft_tokens=self.draft_tokens,
        )
        loads = torch.zeros(count_moe_layers(config), config.num_experts, dtype=torch.int64)
        self._counters = Counters(loads, [0] * self.draft_tokens, [0] * self.draft_tokens)
        self._progress: dict[Sequence, Progress] = {}
        self._requests: dict[int, list[Sequence]] = {}
        self._num_requests = self._num_sequences = self._num_updates = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return self.scheduler.has_work

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Made when the first grammar comes: it reads the whole vocabulary."""
        return GrammarCompiler(self.tokenizer, self.runtime.config.vocab_size, self.stop_ids)

    def stats(self) -> EngineStats:
        """How things stand; the tensor is a copy."""
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
        """Queue a request; returns its id. ConfigError if it can never run, QueueFullError if too many wait."""
        self._check(request)
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
        for sequence in sequences:
            sampler = make_sampler(params, sequence.index, grammar)
            self._progress[sequence] = Progress(sampler, Drafting(sampler, limit))
        self._requests[request_id] = sequences
        self._num_requests += 1
        self._num_sequences += len(sequences)
        return request_id

    def abort(self, request_id: int) -> bool:
        """Drop a request between two steps, without an event; False if it has ended already."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self._forget(sequence)
        return bool(sequences)

    def update(self, model: Transformer) -> None:
        """Take the weights of another model of the same configuration, in place, and forget every cached prefix.

        ConfigError while requests run or wait, and for what `Runtime.update` refuses; nothing has been changed then.
        """
        if self.has_work:
            raise ConfigError("weights cannot be updated while requests run: finish or abort them first")
        self.runtime.update(model)
        self._follow_updates()

    def step(self) -> list[Event]:
        """Compute one batch; returns the tokens it gave, in the order of arrival among decoding sequences."""
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

    def run(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """Serve requests to the end: for each, in order, its n completions."""
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

    def _follow_updates(self) -> None:
        """What was computed with other weights is forgotten, whoever updated them; MoestroError amid a request."""
        if self._num_updates != self.runtime.num_updates:
            if any(sequence.num_computed or sequence.num_generated for sequence in self._progress):
                raise MoestroError("the model's weights were updated while requests were running")
            self.scheduler.pool.forget()
            self._num_updates = self.runtime.num_updates

    def _run(self, rows: list[Row]) -> list[Computed]:
        """Compute the rows' tokens and drafts, and the logits of the last ones; scores prompts on the way."""
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
        """Log-probabilities of the prompt tokens that follow the row's tokens, once each even after preemption."""
        sequence = part.row.sequence
        scores, count = self._progress[sequence].prompt_logprobs, sequence.params.prompt_logprobs
        assert count is not None
        stop = min(part.row.count, sequence.num_prompt - 1 - part.first)
        # rows before the first were scored when they were computed first
        for start in range(len(scores) - part.first, stop, SCORED_ROWS):
            for logits in self.runtime.logits(part.hidden[start : min(start + SCORED_ROWS, stop)]):
                scores.append(score_token(logits, sequence.tokens[len(scores) + 1], count))

    def _continue(self, part: Computed) -> list[Event]:
        """The tokens that follow a row: as long as its drafts are right, and one more."""
        row, sequence = part.row, part.row.sequence
        if sequence.params.prompt_logprobs is not None:
            self._score_prompt(part)
        self.scheduler.commit(row)
        if not part.likeliest:
            return []
        if not sequence.num_generated:
            self._counters.prompt_tokens += sequence.num_prompt
        drafts = self._progress[sequence].drafting.take(sequence)
        wants = sequence.params.return_routes
        routes = part.routes[-len(part.likeliest) :] if wants else [None] * len(part.likeliest)
        events: list[Event] = []
        for i, (draft, ids) in enumerate(zip([*drafts, None], routes, strict=True)):
            choice = self._choose(sequence, part.logits[i], part.likeliest[i], draft)
            events.append(self._advance(sequence, choice, ids))
            if events[-1].finish_reason or draft is None or choice.token != draft[0]:
                break
            sequence.num_computed += 1
        num_right = sum(draft[0] == event.token for draft, event in zip(drafts, events, strict=False))
        return [*events[:-1], self._count_drafts(sequence, events[-1], len(drafts), num_right)]

    def _choose(self, sequence: Sequence, logits: Tensor, likeliest: int | None, draft: Draft | None) -> Choice:
        params, sampler = sequence.params, self._progress[sequence].sampler
        if likeliest is None:
            return Choice(None, error="the model's numbers are not finite")
        if params.max_tokens == 0:
            return Choice(None)
        try:
            prompt = sequence.tokens[: sequence.num_prompt]
            token = likeliest if sampler.is_plain else sampler.choose(logits, prompt, sequence.generated, draft)
        except Exception as error:  # whatever it is, it is of this sequence alone, and its last event says it
            return Choice(None, error=str(error) or type(error).__name__)
        return Choice(token, None if params.logprobs is None else score_token(logits, token, params.logprobs))

    def _advance(self, sequence: Sequence, choice: Choice, routes: Tensor | None) -> Event:
        """Append a token and find out whether the text ends with it."""
        params, progress = sequence.params, self._progress[sequence]
        is_first = not sequence.num_generated
        sequence.tokens += [] if choice.token is None else [choice.token]
        self._counters.generated_tokens += choice.token is not None
        stop_string = self._find_stop(sequence)
        reason: FinishReason | None = None
        if choice.error:
            reason = "error"
        elif stop_string is not None or self._is_stop(choice.token, params) or progress.sampler.is_finished:
            reason = "stop"
        elif sequence.num_generated >= params.max_tokens:
            reason = "length"
        wants = params.return_routes
        return Event(
            sequence.request_id,
            sequence.index,
            choice.token,
            choice.logprob,
            reason,
            stop_string,
            prompt_logprobs=progress.prompt_logprobs if is_first and params.prompt_logprobs is not None else None,
            routes=self.cache.read_routes(sequence.pages, sequence.num_computed) if wants and reason else None,
            token_routes=None if choice.token is None else routes,
            error=choice.error,
        )

    def _count_drafts(self, sequence: Sequence, event: Event, drafted: int, accepted: int) -> Event:
        """Note a check, and whether drafting still pays; the last event gets the report."""
        drafting = self._progress[sequence].drafting
        if self.drafter is None or not drafting.limit:
            return event
        if drafted:
            drafting.count(drafted, accepted)
            self._counters.add_drafts(drafted, accepted)
        if drafting.off_after is None and not drafting.pays(self.drafter.cost):
            drafting.off_after = sequence.num_generated
            sequence.ahead = 0
            self._counters.speculation_off += 1
        return replace(event, drafts=drafting.report()) if event.finish_reason else event

    def _make_ready(self, parts: list[Computed], going_on: set[Sequence]) -> None:
        """Let the MTP modules follow the text and draft for sequences that go on; make full pages findable."""
        ready = [(part.row.sequence, part.row.sequence.num_computed) for part in parts]
        if self.drafter is not None:
            work = []
            for part in parts:
                sequence, drafting = part.row.sequence, self._progress[part.row.sequence].drafting
                self.drafter.keep(sequence, drafting, part.first, part.hidden[: sequence.num_computed - part.first])
                work.append((sequence, drafting, sequence in going_on))
            ready = self.drafter.run(work)
        for sequence, count in ready:
            self.scheduler.mark_ready(sequence, count)

    def _is_stop(self, token: int | None, params: SamplingParams) -> bool:
        return token in self.stop_ids or token in params.stop_ids

    def _find_stop(self, sequence: Sequence) -> str | None:
        """The first of the stop strings in the text that the last token may have completed."""
        if not sequence.params.stop:
            return None
        longest = max(len(stop.encode()) for stop in sequence.params.stop)
        text = self.tokenizer.decode(sequence.generated[-longest:])  # a token spells a byte at least
        found = [(text.find(stop), stop) for stop in sequence.params.stop if stop in text]
        return min(found)[1] if found else None

    def _forget(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self._progress[sequence]
        left = self._requests[sequence.request_id]
        left.remove(sequence)
        if not left:
            del self._requests[sequence.request_id]

    def _check(self, request: Request) -> None:
        config, params, prompt = self.runtime.config, request.params, request.prompt
        total = len(prompt) + params.max_tokens
        if not prompt:
            raise ConfigError("the prompt is empty")
        if total > config.max_seq_len:
            raise ConfigError(
                f"prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) exceed "
                f"the model's {config.max_seq_len}"
            )
        if params.n > self.scheduler.max_waiting:
            raise ConfigError(f"n={params.n} continuations exceed the queue of {self.scheduler.max_waiting}")
        if pages_for(total) > self.scheduler.pool.num_pages:
            raise ConfigError(f"{total} tokens do not fit the cache of {self.scheduler.pool.num_pages} pages")
        if (params.draft_tokens or 0) > self.draft_tokens:
            raise ConfigError(f"draft_tokens={params.draft_tokens} exceeds the engine's {self.draft_tokens}")
        ids = [*prompt, *params.logit_bias]
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise ConfigError(f"prompt or logit_bias name token ids outside the vocabulary of {config.vocab_size}")


def check_model(config: ModelConfig, draft_tokens: int) -> None:
    """ConfigError for what no engine can serve."""
    if not 0 <= draft_tokens <= MAX_DRAFT_TOKENS:
        raise ConfigError(f"draft_tokens must lie between 0 and {MAX_DRAFT_TOKENS}, not {draft_tokens}")
    if draft_tokens and not config.mtp_depth:
        raise ConfigError(f"draft_tokens={draft_tokens}, but this model has no MTP modules that could draft")


def make_sampler(params: SamplingParams, index: int, grammar: Matcher | None = None) -> Sampler:
    """The sampler of the index-th continuation."""
    return Sampler(
        params.temperature,
        params.top_p,
        params.seed + index,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        grammar=grammar.copy() if grammar else None,
    )


def find_likeliest(logits: Tensor) -> list[int | None]:
    """logits [N, V] -> of each row the token with the largest one, or None where they are not all finite."""
    sums, tokens = logits.sum(-1).tolist(), logits.argmax(-1).tolist()
    return [token if isfinite(total) else None for token, total in zip(tokens, sums, strict=True)]


def score_token(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    """logits [V] fp32 -> the token's log-probability and those of the `num_top` likeliest."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
