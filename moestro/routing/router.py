"""The router: scores, bias, groups, top-k, weights (V3 eq. 12–16; V2 §2.2).

    s = sigmoid(x Wᵀ) or softmax(x Wᵀ)                in fp32, whatever the model computes in
    choose the top-k groups by (s + b), then the top-k experts in them; other groups are −inf, never 0:
                                                      with negative biases 0 could win
    g = s of the chosen, without b, normalised, times `scale`

The bias b steers selection only and has no gradient; `routing/balance.py` moves it. `RouterConfig` is the whole
difference between schemes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Routes:
    """Where N tokens go: ids [N, A] int64, weights [N, A] fp32, scores [N, E] fp32 (before the bias)."""

    ids: Tensor
    weights: Tensor
    scores: Tensor


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


class Router(nn.Module):
    """Linear scores and a bias per expert; `forward` maps x [N, D] to `Routes`."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_dim))
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> Routes:
        config = self.config
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if config.router.score == "sigmoid" else logits.softmax(-1)
        ids = select_experts(
            scores.detach() + self.bias,
            top_k=config.top_k,
            num_groups=config.num_groups,
            top_k_groups=config.top_k_groups,
            group_score=config.router.group_score,
        )
        weights = scores.gather(1, ids)
        if config.router.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routes(ids, weights * config.router.scale, scores)
