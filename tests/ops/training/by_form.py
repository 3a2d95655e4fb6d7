"""The operations of training computed by one form whatever the sizes: the kernels, or plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.ops.training import Matrices, operators


class Form:
    """`native` or `torch`; the functions of `reference.py` that have both."""

    def __init__(self, name: str) -> None:
        self.name = name

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = operators.LinearFunction.apply(x.reshape(-1, x.shape[-1]), weight, self.name)
        return out.view(*x.shape[:-1], len(weight))

    def grouped_experts(self, x: Tensor, gate_up: Matrices, down: Matrices, ids: Tensor, weights: Tensor) -> Tensor:
        matrices = [gate_up, down] if isinstance(gate_up, Tensor) else [*gate_up, *down]
        out: Tensor = operators.ExpertsFunction.apply(x, ids, weights, self.name, *matrices)[0]
        return out

    def packed_attention(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
        out: Tensor = operators.AttentionFunction.apply(q, k, v, starts, scale, self.name)[0]
        return out

    def linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        found = operators.CrossEntropyFunction.apply(hidden, weight, targets, row_weights, with_grad, self.name)
        return found[0], found[1], found[2]


by_kernels, by_torch = Form("native"), Form("torch")
