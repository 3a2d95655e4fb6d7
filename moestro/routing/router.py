"""The router: scores, noise, bias, groups, top-k, weights, capacity. `RouterConfig` is the whole difference of schemes.

    h = x Wᵀ in fp32, whatever the model computes in; s = sigmoid, softmax or √softplus of h
    choose the top-k groups by (s + b), then the top-k experts in them; other groups are −inf, never 0:
                                                      with negative biases 0 could win
    g = s of the chosen, without b, normalised, times `scale`
    what an expert or a device has no room for is not carried out: it passes by on the residual

V3 eq. 12–16, V2 §2.2; noisy top-k from Shazeer et al. 2017 eq. 3–5 (softmax over the kept ones is the softmax over all,
normalised); jitter, capacity and the random second choice from Switch and GShard; hashing by token id from V4.
The bias b steers selection only and has no gradient; `routing/balance.py` moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.config import ModelConfig
from moestro.routing.capacity import find_overflow

JITTER = 0.01  # Switch: inputs of the router times uniform(1 − ε, 1 + ε)


@dataclass(frozen=True, slots=True)
class Routes:
    """Where N tokens go: ids [N, A] int64, weights [N, A] fp32, scores [N, E] fp32 (before the bias).

    `accepted` [N, A] bool: False where a choice is not carried out; None where all are. `overflow` of them, a count,
    for want of room. For the losses: logits [N, E] without noise; under learned noise also `noisy` [N, E] and
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


def select_experts(choice: Tensor, *, top_k: int, num_groups: int, top_k_groups: int, group_score: str) -> Tensor:
    """Biased scores [N, E] -> ids [N, A]: the best groups first, then the best experts inside them.

    A group's score is the sum of its two best experts (`top2`, V3) or its best expert (`max`, V2).
    """
    if num_groups > top_k_groups:
        groups = choice.unflatten(-1, (num_groups, -1))
        best = groups.topk(2 if group_score == "top2" else 1, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(top_k_groups, dim=-1).indices, True)
        choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    return choice.topk(top_k, dim=-1).indices


def hash_experts(tokens: Tensor, *, num_experts: int, top_k: int, layer: int) -> Tensor:
    """Token ids [N] -> expert ids [N, A], fixed for ever: one expert of each of A equal ranges.

    Fibonacci hashing of (token, layer, choice): the high bits of a product with 2⁶⁴/φ, in wrapping int64 arithmetic.
    """
    size = num_experts // top_k
    salt = torch.arange(top_k, device=tokens.device) + layer * top_k + 1
    mixed = (tokens[:, None] + salt * 1_000_003) * -7046029254386353131  # 2⁶⁴/φ as a signed number
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687  # a second round, of splitmix64
    within = ((mixed >> 33) & 0x7FFFFFFF) % size
    return within + torch.arange(top_k, device=tokens.device) * size


class Router(nn.Module):
    """Linear scores and a bias per expert; `layer` is the index of its block, `hashed` whether token ids decide."""

    bias: Tensor

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        moe_index = sum(config.is_moe(index) for index in range(layer))
        self.hashed = config.router.selection == "hash" or moe_index < config.router.num_hash_layers
        shape = (config.num_experts, config.hidden_dim)
        self.weight = nn.Parameter(torch.empty(shape)) if config.router.score != "constant" else None
        self.noise = nn.Parameter(torch.empty(shape)) if config.router.noise == "learned" else None
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor, tokens: Tensor | None = None, starts: Sequence[int] = ()) -> Routes:
        """x [N, D] -> routes. Hash routing needs the token ids [N]; sparing sequences needs where they start."""
        router, rows = self.config.router, x.float()
        if self.training and router.noise == "jitter":
            rows = rows * torch.empty_like(rows).uniform_(1 - JITTER, 1 + JITTER)
        logits = self.logits(rows)
        noisy, std = self.add_noise(rows, logits)
        routes = self.decide(logits, score_experts(noisy, router.score), tokens, starts)
        return routes if std is None else replace(routes, noisy=noisy, noise_std=std)

    def decide(
        self, logits: Tensor, scores: Tensor, tokens: Tensor | None = None, starts: Sequence[int] = ()
    ) -> Routes:
        """Scores [N, E] -> routes: the experts with the best biased scores, weighted by the scores as they are."""
        router = self.config.router
        ids = self.choose(scores, tokens)
        weights = scores.gather(1, ids)
        if router.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        accepted, overflow = self.accept(ids, weights, starts)
        return Routes(ids, weights * router.scale, scores, logits, accepted, overflow)

    def logits(self, rows: Tensor) -> Tensor:
        """rows [N, D] fp32 -> [N, E]; zeros where nothing is learned."""
        if self.weight is None:
            return rows.new_zeros(len(rows), self.config.num_experts)
        return F.linear(rows, self.weight.float())

    def add_noise(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shazeer eq. 4: h + N(0, 1) · softplus(x W_noiseᵀ), in training only -> (noisy logits, noise_std)."""
        if self.noise is None or not self.training:
            return logits, None
        std = F.softplus(F.linear(rows, self.noise.float()))
        return logits + torch.randn_like(logits) * std, std

    def choose(self, scores: Tensor, tokens: Tensor | None) -> Tensor:
        """Biased selection, or the hash of the token: ids [N, A]."""
        config = self.config
        if self.hashed:
            if tokens is None:
                raise ValueError("hash routing needs the token ids")
            return hash_experts(tokens, num_experts=config.num_experts, top_k=config.top_k, layer=self.layer)
        return select_experts(
            self.biased(scores),
            top_k=config.top_k,
            num_groups=config.num_groups,
            top_k_groups=config.top_k_groups,
            group_score=config.router.group_score,
        )

    def biased(self, scores: Tensor) -> Tensor:
        """Scores [N, E] as they are compared: with the bias, without gradient."""
        free = scores.detach()
        return free * (1 + self.bias) if self.config.router.bias == "multiplicative" else free + self.bias

    @torch.no_grad()
    def accept(self, ids: Tensor, weights: Tensor, starts: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Which choices [N, A] are carried out, and how many were not for want of room; None where all are."""
        config, capacity = self.config, self.config.router.capacity
        factor = capacity.factor if self.training else capacity.eval_factor
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if config.router.random_second and self.training:
            wanted = torch.rand_like(weights) < 2 * weights
            wanted[:, 0] = True
        elif not factor:
            return None, None
        if not factor:
            return wanted, ids.new_zeros(())
        per_unit = config.num_experts // config.num_groups if capacity.unit == "device" else 1
        units = ids // per_unit
        room = math.ceil(round(factor * ids.numel() * per_unit / config.num_experts, 6))  # 110.00000000000001 is 110
        affinity = weights if capacity.order == "affinity" else None
        spared = spare_sequences(len(ids), starts, capacity.spared_fraction if self.training else 0.0)
        overflow = find_overflow(units, wanted, room, affinity=affinity, spared=spared)
        return wanted & ~overflow, overflow.sum()


def score_experts(logits: Tensor, score: str) -> Tensor:
    """Logits [N, E] -> scores [N, E]."""
    match score:
        case "sigmoid":
            return logits.sigmoid()
        case "softmax":
            return logits.softmax(-1)
        case "sqrt_softplus":
            return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()  # √ has no slope at 0
    return torch.ones_like(logits)


def spare_sequences(num_tokens: int, starts: Sequence[int], fraction: float) -> Tensor | None:
    """Tokens [N] of a random `fraction` of the sequences, or None."""
    if not fraction or len(starts) < 2:
        return None
    lengths = torch.tensor(starts).diff()
    chosen: Tensor = torch.rand(len(lengths)) < fraction
    return chosen.repeat_interleave(lengths, output_size=num_tokens)
