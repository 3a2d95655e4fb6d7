"""What an engine reports about its requests: an event for every token, and completions that collect events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from moestro.engine.stats import DraftCounts

FinishReason = Literal["stop", "length", "error"]
FailureKind = Literal["request", "grammar", "engine"]


@dataclass(frozen=True)
class Failure:
    """Why a continuation failed, and by whose fault.

    "request": its settings leave nothing to draw from. "grammar": its grammar cannot be followed any further.
    "engine": the model or the engine failed; if an exception was raised, the log has the traceback.
    """

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability by the model alone, in nats, and the likeliest tokens (id, logprob) in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """One more token of a continuation, and with the last one why it ends.

    A step may bring several events of one continuation, in order. `token` is None if the prompt was only computed, or
    if the request failed; `error` then says how. `text` is what may be shown now, if the request wants text: whole
    characters, up to `stop_string`, the stop string that ended the text. `token_routes` [MoE layers, top_k] int16 are
    the experts of the token before this one, which predicted it; only if the request wants routes.

    The first event has `prompt_logprobs`, for every prompt token but the first, and `num_cached`, how many tokens of
    the prompt were found in the cache. The last event has `drafts`, if the
    sequence was to draft, and `routes` [tokens, MoE layers, top_k] int16, for every computed token: that is all but the
    last one of the continuation.
    """

    request_id: int
    index: int
    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    text: str = ""
    prompt_logprobs: list[TokenLogprob] | None = None
    routes: Tensor | None = None
    token_routes: Tensor | None = None
    drafts: DraftCounts | None = None
    error: Failure | None = None
    num_cached: int = 0


@dataclass
class Completion:
    """All events of one continuation, collected."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    routes: Tensor | None = None
    drafts: DraftCounts | None = None
    error: Failure | None = None

    def add(self, event: Event) -> None:
        """Add what an event brings."""
        self.ids += [] if event.token is None else [event.token]
        self.text += event.text
        self.logprobs += [] if event.logprob is None else [event.logprob]
        self.finish_reason, self.stop_string, self.routes = event.finish_reason, event.stop_string, event.routes
        self.drafts, self.error = event.drafts, event.error
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
