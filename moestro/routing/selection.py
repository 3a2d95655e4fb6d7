"""The one specification of how a token's experts are chosen and weighed, for training and for serving.

    s = score(h): one of `scores.SCORES`, such as the sigmoid of the logits h
    c = s + b, or s · (1 + b): the bias steers the comparison only and has no gradient
    groups: the best `top_k_groups` by the sum of their `group_best` best c; other groups are −inf, never 0:
            with negative biases 0 could win
    experts: the best `top_k` by c in the groups that are left; ties go to the lowest id, for experts and groups
    weights: s of the chosen, without b, normalised or not, times `scale`

V3 eq. 12–16, V2 §2.2. `Router` trains with these functions, serving without kernels uses them too (with sums in a fixed
order, see `Arithmetic`), and the kernels are tested against them. The ids may be given instead: replayed, or hashed
from the token (V4). Their weights still come from the layer's own scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.scores import SCORES, Arithmetic


@dataclass(frozen=True, eq=False)
class Selection:
    """What `choose` and `weigh` need to know about a router: its scheme, and its bias [E].

    `layer` is the index of the router's block; if `hashed`, it is hashed together with the token.
    """

    bias: Tensor
    score: str
    top_k: int
    num_groups: int
    top_k_groups: int
    group_best: int
    scale: float
    multiply: bool
    normalize: bool
    hashed: bool
    layer: int

    def hash(self, tokens: Tensor) -> Tensor:
        """Token ids [N] -> expert ids [N, A], for a router that is `hashed`."""
        return hash_experts(tokens, num_experts=len(self.bias), top_k=self.top_k, layer=self.layer)


class TorchArithmetic:
    """Torch's own functions."""

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return function(x)

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def sum(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)


TORCH = TorchArithmetic()


def describe_selection(config: ModelConfig, layer: int, bias: Tensor) -> Selection:
    """The selection of the router in block `layer` of a model."""
    router = config.router
    return Selection(
        bias=bias,
        score=router.score,
        top_k=config.top_k,
        num_groups=config.num_groups,
        top_k_groups=config.top_k_groups,
        group_best=2 if router.group_score == "top2" else 1,
        scale=router.scale,
        multiply=router.bias == "multiplicative",
        normalize=router.normalize,
        hashed=is_hashed(config, layer),
        layer=layer,
    )


def is_hashed(config: ModelConfig, layer: int) -> bool:
    """Whether token ids alone decide in block `layer`."""
    moe_index = sum(config.is_moe(index) for index in range(layer))
    return config.router.selection == "hash" or moe_index < config.router.num_hash_layers


def score_experts(logits: Tensor, score: str, arithmetic: Arithmetic = TORCH) -> Tensor:
    """Logits [N, E] -> scores [N, E]; ValueError for a function that is unknown, or that cuts off the gradient."""
    if score not in SCORES:
        raise ValueError(f"unknown score function '{score}'")
    scores = SCORES[score].apply(logits, arithmetic)
    if scores.shape != logits.shape or scores.requires_grad != logits.requires_grad:
        raise ValueError(f"score function '{score}' must give one score a logit, with its gradient")
    return scores


def add_bias(scores: Tensor, selection: Selection) -> Tensor:
    """Scores [N, E] for the comparison: with the bias, without gradient."""
    free = scores.detach()
    return free * (1 + selection.bias) if selection.multiply else free + selection.bias


def choose(compared: Tensor, selection: Selection) -> Tensor:
    """Biased scores [N, E] -> ids [N, A], best first."""
    s = selection
    if s.num_groups > s.top_k_groups:
        groups = compared.unflatten(-1, (s.num_groups, -1))
        best = groups.topk(s.group_best, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, find_best(best, s.top_k_groups), True)
        compared = torch.where(kept.unsqueeze(-1), groups, float("-inf")).flatten(1)
    return find_best(compared, s.top_k)


def find_best(values: Tensor, count: int) -> Tensor:
    """values [N, E] -> indices [N, count] of the largest, in falling order; among equals the lowest index first.

    `topk` promises no order among equals, so fp32 values are compared as integers that end in the index.
    """
    if values.dtype != torch.float32:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    bits = (values + 0.0).view(torch.int32)  # no −0
    key = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()  # sorts as the values do
    last = values.shape[-1] - 1
    key.bitwise_left_shift_(32).add_(torch.arange(last, -1, -1, device=values.device))
    return last - key.topk(count, dim=-1).values.bitwise_and_(0xFFFFFFFF)


def weigh(scores: Tensor, ids: Tensor, selection: Selection, arithmetic: Arithmetic = TORCH) -> Tensor:
    """Unbiased scores [N, E] and ids [N, A] -> weights [N, A]."""
    weights = scores.gather(1, ids)
    if selection.normalize:
        weights = weights / (arithmetic.sum(weights) + 1e-20)
    return weights * selection.scale


def hash_experts(tokens: Tensor, *, num_experts: int, top_k: int, layer: int) -> Tensor:
    """Token ids [N] -> expert ids [N, A], fixed for ever: one expert from each of A equal ranges.

    Fibonacci hashing of (token, layer, choice): the high bits of a product with 2⁶⁴/φ, in wrapping int64 arithmetic.
    """
    size = num_experts // top_k
    choice = torch.arange(top_k, device=tokens.device)
    mixed = (tokens[:, None] + (choice + layer * top_k + 1) * 1_000_003) * -7046029254386353131  # 2⁶⁴/φ, signed
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687  # a second round, of splitmix64
    within = ((mixed >> 33) & 0x7FFFFFFF) % size
    return within + choice * size
