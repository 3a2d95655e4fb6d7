"""A request and the sequences it becomes: what was asked, what is known so far. Plain Python, no tensors.

A sequence is a list of token ids; the first `num_computed` have their rows in the cache. Prefill, decoding,
recomputing after preemption and checking drafts are all the same: computing `num_pending` further tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from moestro.errors import ConfigError

MAX_DRAFT_TOKENS = 8
MAX_N, MAX_TOP_LOGPROBS, MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES = 128, 20, 16, 256, 1024


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is continued. ConfigError for values out of range.

    `temperature` 0 is greedy. `top_k` 0 keeps all. Penalties act on logits, in this order: `repetition_penalty`
    (CTRL, divides positive logits and multiplies negative ones of tokens in the prompt or continuation),
    `frequency_penalty` · count + `presence_penalty` (over the continuation), then `logit_bias`. `logprobs` and
    `prompt_logprobs`: how many of the likeliest tokens to report beside each token's own log-probability; None: no
    log-probabilities. They are the model's, before penalties and temperature. `n` continuations use the seeds seed,
    seed + 1, … A `stop_ids` token stays as the last token of the result; text ends before a `stop` string.
    `return_text`: events bring the text; it includes control tokens only if `spelled_ids` names them. `max_tokens` 0
    only computes the prompt. The text must follow `grammar` (see `grammar.py`) and ends with it. `draft_tokens`: how
    many tokens the model's MTP modules draft a step; 0 for none, None for the engine's setting. Drafts never change a
    greedy continuation; at a temperature they change which one is drawn, but not how likely any is.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_routes: bool = False
    return_text: bool = False
    spelled_ids: frozenset[int] = frozenset()
    grammar: str | None = None
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 0, math.inf),
            ("top_k", 0, math.inf),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("n", 1, MAX_N),
            ("logprobs", 0, MAX_TOP_LOGPROBS),
            ("prompt_logprobs", 0, MAX_TOP_LOGPROBS),
            ("draft_tokens", 0, MAX_DRAFT_TOKENS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} must lie between {low} and {high}, not {value}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie between 0 and 2**63 - 1, not {self.seed}")
        if len(self.logit_bias) > MAX_BIASES or any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ConfigError(f"logit_bias may name {MAX_BIASES} tokens with values between -100 and 100")
        if len(self.stop) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise ConfigError(f"stop may name {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")


@dataclass(frozen=True)
class Request:
    """Token ids to continue, and how."""

    prompt: Items[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(eq=False)
class Sequence:
    """One continuation of a request. `arrival` orders all sequences of an engine; `index` is its place among the n.

    `drafts` may follow `tokens` and are computed with the last token. `num_ready` positions have the rows of all
    layers, including the MTP modules. `ahead`: how many positions past its tokens a step may write to.
    """

    arrival: int
    request_id: int
    index: int
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_prefill: int = 0  # its tokens when it began to run: it decodes once they are computed
    num_cached: int = 0  # prompt tokens found in the cache when it began
    num_ready: int = 0
    ahead: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        """Tokens and drafts whose rows are not in the cache yet; 1 and the drafts while decoding."""
        return len(self.tokens) + len(self.drafts) - self.num_computed

    @property
    def num_positions(self) -> int:
        """Positions that need room in the cache before the next step."""
        return min(len(self.tokens) + self.ahead, self.num_prompt + self.params.max_tokens)

    @property
    def is_prefilling(self) -> bool:
        """Whether it still has to be computed up to where decoding goes on."""
        return self.num_computed < self.num_prefill

    @property
    def num_generated(self) -> int:
        """Tokens of the continuation so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def generated(self) -> list[int]:
        """The continuation so far."""
        return self.tokens[self.num_prompt :]

    @property
    def reads_prefixes(self) -> bool:
        """Whether it may use rows cached by others; logprobs of a prompt need the prompt computed."""
        return self.params.prompt_logprobs is None
