"""The mixture-of-experts layer: a router, E small experts (each token uses A), and shared experts for every token.

h = x + Shared(x) + Σ_a w_a · Expert_a(x)   (V3 eq. 12; the residual is the block's)

The layer returns its routing and never keeps it. It is given its experts, and does not make them: any module that maps
(x, routes) to [N, D], such as `Experts` here, or one that uses copies, other processes or a disk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.config import ModelConfig
from moestro.model.attention import Context
from moestro.model.layers import MLP
from moestro.ops.precision import Precision
from moestro.routing.router import Router, Routes


class Experts(nn.Module):
    """E SwiGLU experts as two batched matrices: gate_up [E, 2F, D] (gate rows first), down [E, D, F]."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.precision: Precision = precision
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_dim, config.hidden_dim))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.hidden_dim, config.expert_dim))

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        ids = routes.ids
        if routes.accepted is not None:
            ids = ids.masked_fill(~routes.accepted, self.gate_up.shape[0])
        return ops.grouped_experts(x, self.gate_up, self.down, ids, routes.weights, self.precision)


class MoE(nn.Module):
    """x [N, D] -> (output [N, D], routes); `layer` is the index of the block."""

    def __init__(self, config: ModelConfig, layer: int, experts: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.router = Router(config, layer)
        self.experts = experts
        shared_dim = config.expert_dim * config.num_shared_experts
        self.shared = MLP(config.hidden_dim, shared_dim, precision) if shared_dim else None

    def forward(self, x: Tensor, context: Context, ids: Tensor | None = None) -> tuple[Tensor, Routes]:
        """`ids` [N, A] replay an earlier choice; the weights are this router's own."""
        starts, seed = context.batch.starts, context.noise_seed
        routes = self.router(x, context.tokens, starts, noise_seed=seed, ids=ids)
        out = self.experts(x, routes)
        return (out if self.shared is None else out + self.shared(x)), routes
