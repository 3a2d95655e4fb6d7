"""How one sequence continues: the next token is chosen and appended, and may end the text."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from moestro.data.tokenizer import Tokenizer
from moestro.engine.events import Event, Failure, FinishReason, TokenLogprob
from moestro.engine.grammar import GrammarError, Matcher
from moestro.engine.sampler import Draft, Sampler
from moestro.engine.sequence import SamplingParams, Sequence
from moestro.engine.speculative import Drafting
from moestro.engine.stops import Detokenizer, StopMatcher
from moestro.errors import MoestroError

log = logging.getLogger("moestro.engine")


@dataclass(eq=False)
class Continuation:
    """What an engine keeps for a sequence besides its tokens. `stop_ids` end the text and are not part of it.

    `detokenizer` is None if nobody asked for the text. `prompt_logprobs` cover the part of the prompt computed so far.
    """

    sequence: Sequence
    sampler: Sampler
    drafting: Drafting
    stop_ids: frozenset[int]
    stops: StopMatcher
    detokenizer: Detokenizer | None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def extend(self, logits: Tensor, likeliest: int | None, draft: Draft | None, routes: Tensor | None) -> Event:
        """Choose one more token and return its event.

        `logits` [V] fp32; `likeliest` is their likeliest token, None if they are not finite; `draft` is checked against
        them; `routes` [L, A] belong to the token before.
        """
        sequence, params = self.sequence, self.sequence.params
        is_first = not sequence.num_generated
        token, failure = self._choose(logits, likeliest, draft)
        sequence.tokens += [] if token is None else [token]
        text = self._spell(token)
        reason: FinishReason | None = "error" if failure else self._reason_to_end(token)
        logprob = None if token is None or params.logprobs is None else score_token(logits, token, params.logprobs)
        return Event(
            sequence.request_id,
            sequence.index,
            token,
            logprob,
            reason,
            self.stops.found,
            text + (self._finish_text() if reason else ""),
            prompt_logprobs=self.prompt_logprobs if is_first and params.prompt_logprobs is not None else None,
            token_routes=None if token is None else routes,
            error=failure,
            num_cached=sequence.num_cached if is_first else 0,
        )

    def _choose(self, logits: Tensor, likeliest: int | None, draft: Draft | None) -> tuple[int | None, Failure | None]:
        """The next token, or None if the request wants no token or fails."""
        sequence, sampler = self.sequence, self.sampler
        if likeliest is None:
            return None, Failure("engine", "the model's numbers are not finite")
        if sequence.params.max_tokens == 0:
            return None, None
        if sampler.is_plain:
            return likeliest, None
        try:
            prompt = sequence.tokens[: sequence.num_prompt]
            return sampler.choose(logits, prompt, sequence.generated, draft), None
        except GrammarError as error:
            return None, Failure("grammar", str(error))
        except MoestroError as error:
            return None, Failure("request", str(error))
        except Exception as error:  # whatever it is, only this sequence fails
            log.exception("sampling failed for request %d", sequence.request_id)
            return None, Failure("engine", str(error) or type(error).__name__)

    def _spell(self, token: int | None) -> str:
        """The text that the token lets us show."""
        if self.detokenizer is None or token is None or token in self.stop_ids:
            return ""
        return self.stops.push(self.detokenizer.push(token))

    def _finish_text(self) -> str:
        """The text that was held back."""
        rest = "" if self.detokenizer is None else self.detokenizer.finish()
        return self.stops.push(rest) + self.stops.finish()

    def _reason_to_end(self, token: int | None) -> FinishReason | None:
        if self.stops.found is not None or token in self.stop_ids or self.sampler.is_finished:
            return "stop"
        return "length" if self.sequence.num_generated >= self.sequence.params.max_tokens else None


def begin_continuation(
    sequence: Sequence, tokenizer: Tokenizer, stop_ids: frozenset[int], grammar: Matcher | None, draft_limit: int
) -> Continuation:
    """A new continuation. `stop_ids` end every request's text; `draft_limit`: drafts a step."""
    params = sequence.params
    sampler = make_sampler(params, sequence.index, grammar)
    wants_text = params.return_text or params.stop
    return Continuation(
        sequence,
        sampler,
        Drafting(sampler, draft_limit),
        stop_ids | params.stop_ids,
        StopMatcher(params.stop),
        Detokenizer(tokenizer, params.spelled_ids) if wants_text else None,
    )


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


def score_token(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    """logits [V] fp32 -> the log-probabilities of the token and of the `num_top` likeliest tokens."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
