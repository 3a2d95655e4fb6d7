"""The basic layers. Parameters keep their own precision (fp32 master weights in training); each operation takes the
precision of its product as an argument, never from autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.ops.precision import Fp8Recipe, Precision


class Linear(nn.Module):
    """y = x Wᵀ, without bias, computed in `precision`. weight [out, in]."""

    def __init__(self, in_dim: int, out_dim: int, precision: Precision) -> None:
        super().__init__()
        self.precision: Precision = precision
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.precision)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; the mean is taken in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU feed-forward: W_down(silu(W_gate x) ⊙ W_up x); gate and up are one matrix, gate rows first."""

    def __init__(self, hidden_dim: int, inner_dim: int, precision: Precision) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_dim, 2 * inner_dim, precision)
        self.down = Linear(inner_dim, hidden_dim, precision)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.gate_up.precision, Fp8Recipe):  # one operation: what lies between is kept in FP8
            return ops.mlp(x, self.gate_up.weight, self.down.weight, self.gate_up.precision)
        out: Tensor = self.down(ops.swiglu(self.gate_up(x)))
        return out
