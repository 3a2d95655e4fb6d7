"""From logits to a token: greedy at temperature 0, else temperature and top-p with a random stream of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moestro.errors import ConfigError


class Sampler:
    """One request's way of choosing. The same seed gives the same choices from the same logits."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (greedy) or more, not {temperature}")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top-p must lie in (0, 1], not {top_p}")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"the seed must be 0 or more and below 2⁶³, not {seed}")
        self.temperature = temperature
        self.top_p = top_p
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """logits [V] -> token id."""
        if self.temperature == 0:
            return int(logits.argmax())
        p = (logits.float() / self.temperature).softmax(-1)
        p, order = p.sort(descending=True)
        # keep the smallest set whose mass reaches top_p: a token stays while the mass before it is below
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)
        return int(order[torch.multinomial(p, 1, generator=self.generator)])
