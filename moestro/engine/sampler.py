"""From logits to a token: greedy at temperature 0, else drawn with the sequence's own random stream.

The order: penalties and biases on the logits; what the grammar allows; temperature; then top-k, top-p and min-p. Each
of these three sees the probabilities before any of them was applied, so that a token has to pass all three.

A draft x, drawn from q, is checked against the p that holds without it (Leviathan et al. 2023, algorithm 1). It is kept
with probability min(1, p(x)/q(x)), else replaced by a draw from (p - q)+, normalised. The result has the distribution p
whatever q was. When greedy, a draft is kept if it is the likeliest token.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moestro.engine.grammar import Matcher
from moestro.errors import ConfigError, MoestroError

CANDIDATES = 1024  # tokens that are sorted first
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # fp32 fails beyond these, which already mean greedy and uniform

Draft = tuple[int, Tensor | None]  # a token and the probabilities [V] it was drawn from, None where greedy


class SamplingError(MoestroError):
    """The scores leave nothing to draw from."""


class Sampler:
    """One sequence's way of choosing. The same seed gives the same choices from the same logits.

    `grammar` follows the text; `top_k` 0 and `min_p` 0 keep all tokens; `sequence.SamplingParams` describes the other
    settings.
    """

    def __init__(
        self,
        temperature: float,
        top_p: float,
        seed: int,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Matcher | None = None,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (greedy) or more, not {temperature}")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], not {top_p}")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"the seed must be 0 or more and below 2⁶³, not {seed}")
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.repetition_penalty = repetition_penalty
        self.presence_penalty = presence_penalty
        self.frequency_penalty = frequency_penalty
        self.logit_bias = dict(logit_bias or {})
        self.grammar = grammar
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def is_plain(self) -> bool:
        """Whether it always takes the model's likeliest token, whatever came before."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return self.temperature == 0 and not penalties and not self.logit_bias and self.grammar is None

    @property
    def is_finished(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self.grammar is not None and self.grammar.is_finished

    def fork(self) -> Sampler:
        """A sampler to try out what may come: its own copy of the grammar, the same random stream."""
        other = copy.copy(self)
        other.grammar = self.grammar.copy() if self.grammar else None
        return other

    def choose(
        self,
        logits: Tensor,
        prompt: Sequence[int] = (),
        generated: Sequence[int] = (),
        draft: Draft | None = None,
    ) -> int:
        """logits [V], the tokens before -> token id, by which the grammar advances. `draft`: the one for this place."""
        scores = self.score(logits, prompt, generated)
        if self.temperature == 0:
            token = int(scores.argmax())
        elif draft is None:
            token = self._draw(self.weigh(scores))
        else:
            token = self._check(self.weigh(scores), *draft)
        return self._accept(token)

    def propose(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Draft:
        """logits [V] of the MTP module, the tokens before -> a draft."""
        scores = self.score(logits, prompt, generated)
        if self.temperature == 0:
            return self._accept(int(scores.argmax())), None
        q = self.weigh(scores)
        return self._accept(self._draw(q)), q

    def score(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
        """logits [V] after penalties, biases and grammar: -inf for tokens that the grammar does not allow."""
        scores = self.penalize(logits, prompt, generated)
        return scores if self.grammar is None else scores.masked_fill(~self.grammar.allowed(), -math.inf)

    def weigh(self, scores: Tensor) -> Tensor:
        """scores [V] -> probabilities [V] after temperature, top-k, top-p and min-p."""
        temperature, best = min(max(self.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE), scores.max()
        if not torch.isfinite(best):
            raise SamplingError("penalties have made a token's score infinite")
        p = ((scores.float() - best) / temperature).softmax(-1)
        return p if self.top_p == 1 and not self.top_k and not self.min_p else self._cut(p)

    def _cut(self, p: Tensor) -> Tensor:
        """p [V], normalised, with 0 for what top-k, top-p and min-p drop.

        The likeliest tokens are sorted first, the others only if those do not decide: sorting a vocabulary of 160k
        takes as long as half a step.
        """
        for count in (min(CANDIDATES, len(p)), len(p)):
            values, order = p.topk(count)
            # the smallest set whose mass reaches top_p: a token stays while the mass before it is below
            dropped = (values.cumsum(-1) - values >= self.top_p) & (self.top_p < 1)
            dropped |= values < self.min_p * values[0]
            if self.top_k:
                dropped[self.top_k :] = True
            dropped[0] = False  # whatever a tiny top_p is rounded to
            if dropped[-1]:
                break
        values = values.masked_fill(dropped, 0.0)
        return torch.zeros_like(p).scatter_(0, order, values / values.sum())

    def _draw(self, p: Tensor) -> int:
        """Draw a token from p [V] with one random number; never one of probability 0."""
        mass = p.double().cumsum(-1)
        point = torch.rand((), dtype=torch.float64, generator=self.generator) * mass[-1]
        return int(torch.searchsorted(mass, torch.minimum(point, mass[-1].nextafter(mass[0] * 0)), right=True))

    def _check(self, p: Tensor, token: int, q: Tensor | None) -> int:
        assert q is not None
        if float(torch.rand((), generator=self.generator)) * float(q[token]) < float(p[token]):
            return token
        rest = (p - q).clamp_(min=0.0)
        return self._draw(rest if rest.any() else p)  # all zero: p = q but for rounding

    def _accept(self, token: int) -> int:
        if self.grammar is not None:
            self.grammar.advance(token)
        return token

    def penalize(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
        """logits [V] after penalties and biases; the same tensor if there are none."""
        counted = self.presence_penalty or self.frequency_penalty
        if self.repetition_penalty == 1 and not counted and not self.logit_bias:
            return logits
        logits = logits.float().clone()
        if self.repetition_penalty != 1:
            seen = torch.tensor(sorted({*prompt, *generated}))
            values = logits[seen]
            scaled = torch.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
            logits[seen] = scaled
        counts = Counter(generated)
        if counted and counts:
            amounts = torch.tensor([self.frequency_penalty * n + self.presence_penalty for n in counts.values()])
            logits[torch.tensor(list(counts))] -= amounts
        if self.logit_bias:
            logits[torch.tensor(list(self.logit_bias))] += torch.tensor(list(self.logit_bias.values()))
        return logits
