"""The router: scores, noise, bias, groups, top-k, weights, capacity. Schemes differ in `RouterConfig` alone.

    h = x Wᵀ in fp32, whatever the model's precision; s = sigmoid, softmax, … of h
    choose the top-k groups by (s + b), then the top-k experts in them; other groups are −inf, never 0:
                                                      with negative biases 0 could win
    g = s of the chosen, without b, normalised, times `scale`
    a choice for which its expert or device has no room is dropped: the residual carries the token

V3 eq. 12–16, V2 §2.2; noisy top-k from Shazeer et al. 2017 eq. 3–5 (a softmax over the kept experts is the softmax over
all, normalised); jitter, capacity and the random second choice from Switch and GShard; hashing by token id from V4.
The bias b steers selection only and has no gradient; `routing/balance.py` moves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.config import ModelConfig
from moestro.routing.capacity import find_overflow
from moestro.routing.selection import (
    Selection,
    add_bias,
    choose,
    describe_selection,
    is_hashed,
    score_experts,
    weigh,
)
from moestro.scores import SCORES

JITTER = 0.01  # Switch: inputs of the router times uniform(1 − ε, 1 + ε)


@dataclass(frozen=True, slots=True)
class Routes:
    """Where N tokens go: ids [N, A] int64, weights [N, A] fp32, scores [N, E] fp32 (before the bias).

    `accepted` [N, A] bool: False where a choice is dropped; None if none is. `overflow` counts the choices dropped for
    lack of room. For the losses: logits [N, E] without noise; under learned noise also `noisy` [N, E] and
    `noise_std` [N, E].
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor | None = None
    accepted: Tensor | None = None
    overflow: Tensor | None = None
    noisy: Tensor | None = None
    noise_std: Tensor | None = None


class Router(nn.Module):
    """Linear scores and a bias per expert; `layer` is its block's index, `hashed` says whether token ids decide."""

    bias: Tensor

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.hashed = is_hashed(config, layer)
        shape = (config.num_experts, config.hidden_dim)
        self.weight = nn.Parameter(torch.empty(shape)) if SCORES[config.router.score].is_learned else None
        self.noise = nn.Parameter(torch.empty(shape)) if config.router.noise == "learned" else None
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(
        self,
        x: Tensor,
        tokens: Tensor | None = None,
        starts: Tensor | None = None,
        *,
        noise_seed: int = 0,
        ids: Tensor | None = None,
    ) -> Routes:
        """x [N, D] -> routes. Hash routing needs the token ids [N]; sparing sequences needs where they start [S + 1].

        `ids` [N, A]: a choice made earlier; this router's own scores weigh it. Noise depends only on `noise_seed` and
        the layer, so recomputing gives the same noise.
        """
        router, rows = self.config.router, x.float()
        noise = Noise(noise_seed, self.layer)
        if self.training and router.noise == "jitter":
            rows = rows * (1 - JITTER + 2 * JITTER * noise.uniform(rows))
        logits = self.logits(rows)
        noisy, std = self.add_noise(rows, logits, noise)
        scores = score_experts(noisy, router.score)
        if ids is None:
            ids = self.choose(scores, tokens)
        weights = weigh(scores, ids, self.selection)
        accepted, overflow = self.accept(ids, weights / router.scale, starts, noise)
        return Routes(ids, weights, scores, logits, accepted, overflow, None if std is None else noisy, std)

    def logits(self, rows: Tensor) -> Tensor:
        """rows [N, D] fp32 -> [N, E]; zeros if there is no learned gate."""
        if self.weight is None:
            return rows.new_zeros(len(rows), self.config.num_experts)
        return F.linear(rows, self.weight.float())

    def add_noise(self, rows: Tensor, logits: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        """Shazeer eq. 4: h + N(0, 1) · softplus(x W_noiseᵀ), in training only -> (noisy logits, noise_std)."""
        if self.noise is None or not self.training:
            return logits, None
        std = F.softplus(F.linear(rows, self.noise.float()))
        return logits + noise.normal(logits) * std, std

    def choose(self, scores: Tensor, tokens: Tensor | None) -> Tensor:
        """ids [N, A], by biased scores or by the hash of the token."""
        selection = self.selection
        if not selection.hashed:
            return choose(add_bias(scores, selection), selection)
        if tokens is None:
            raise ValueError("hash routing needs the token ids")
        return selection.hash(tokens)

    @property
    def selection(self) -> Selection:
        """How this router chooses and weighs."""
        return describe_selection(self.config, self.layer, self.bias)

    @torch.no_grad()
    def accept(
        self, ids: Tensor, weights: Tensor, starts: Tensor | None, noise: Noise
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which choices [N, A] are carried out, and how many had no room; (None, None) if all are."""
        config, capacity = self.config, self.config.router.capacity
        factor = capacity.factor if self.training else capacity.eval_factor
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if config.router.random_second and self.training:
            wanted = noise.uniform(weights) < 2 * weights
            wanted[:, 0] = True
        elif not factor:
            return None, None
        if not factor:
            return wanted, ids.new_zeros(())
        per_unit = config.num_experts // config.num_groups if capacity.unit == "device" else 1
        units = ids // per_unit
        room = math.ceil(round(factor * ids.numel() * per_unit / config.num_experts, 6))  # 110.00000000000001 is 110
        affinity = weights if capacity.order == "affinity" else None
        spared = None
        if self.training and capacity.spared_fraction and starts is not None:
            spared = spare_sequences(len(ids), starts, noise.uniform(starts[1:]) < capacity.spared_fraction)
        overflow = find_overflow(units, wanted, room, affinity=affinity, spared=spared)
        return wanted & ~overflow, overflow.sum()


def spare_sequences(num_tokens: int, starts: Tensor, spared: Tensor) -> Tensor:
    """Spared sequences [S] bool, starts [S + 1] -> spared tokens [N] bool."""
    return spared.repeat_interleave(starts.diff(), output_size=num_tokens)


class Noise:
    """Random numbers for one router in one pass: its own stream, drawn on the CPU, so the same on every device."""

    def __init__(self, seed: int, layer: int) -> None:
        self._seed = mix_seed(seed, layer)
        self._generator: torch.Generator | None = None

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1), fp32, with the shape and device of `like`."""
        return torch.rand(like.shape, generator=self._get()).to(like.device)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, fp32, with the shape and device of `like`."""
        return torch.randn(like.shape, generator=self._get()).to(like.device)

    def _get(self) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self._seed)
        return self._generator


def mix_seed(seed: int, index: int) -> int:
    """A seed for the index-th stream of `seed`: 63 bits, well apart (splitmix64)."""
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
    return (mixed ^ (mixed >> 31)) >> 1
