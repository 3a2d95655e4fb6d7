"""The mixture-of-experts layer: a router, E small experts of which each token uses A, and shared experts that all use.

h = x + Shared(x) + Σ_a w_a · Expert_a(x)   (V3 eq. 12; the residual is the block's)

The routing is returned, never kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.config import ModelConfig
from moestro.model.layers import MLP
from moestro.routing.router import Router, Routes


class Experts(nn.Module):
    """E SwiGLU experts as two batched matrices: gate_up [E, 2F, D] (gate rows first), down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_dim, config.hidden_dim))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.hidden_dim, config.expert_dim))

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        ids = routes.ids
        if routes.accepted is not None:
            ids = ids.masked_fill(~routes.accepted, self.gate_up.shape[0])
        return ops.grouped_experts(x, self.gate_up.to(x.dtype), self.down.to(x.dtype), ids, routes.weights)


class MoE(nn.Module):
    """x [N, D] -> (output [N, D], routes); `layer` is the index of the block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config)
        self.shared = (
            MLP(config.hidden_dim, config.expert_dim * config.num_shared_experts) if config.num_shared_experts else None
        )

    def forward(self, x: Tensor, tokens: Tensor, starts: Sequence[int]) -> tuple[Tensor, Routes]:
        routes = self.router(x, tokens, starts)
        out = self.experts(x, routes)
        return (out if self.shared is None else out + self.shared(x)), routes
