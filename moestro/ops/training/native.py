"""The large operations of training on the compiled kernels, forward and backward, as functions of tensors.

`operators.py` calls them where they can run and pay; `fused.py` computes the same in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.training.fused import sort_by_expert

MIN_LOAD = 8  # choices per expert below which packing its weights, done anew in every call, costs more than it saves
MIN_ROWS = 32  # of a linear layer, for the same reason


def matmul(a: Tensor, b: Tensor, *, a_transposed: bool = False, b_transposed: bool = False) -> Tensor:
    """a [M, K] or, transposed, [K, M]; b [K, N] or [N, K]; rows contiguous -> [M, N] in their type, sums in fp32."""
    m, k = a.shape[::-1] if a_transposed else a.shape
    k_b, n = b.shape[::-1] if b_transposed else b.shape
    if k != k_b or a.stride(1) != 1 or b.stride(1) != 1:
        raise ValueError(f"cannot multiply [{m}, {k}] by [{k_b}, {n}], strides {a.stride()} and {b.stride()}")
    out = a.new_empty(m, n)
    kind = library.TYPES[a.dtype]
    strides = (n, max(a.stride(0), a.shape[1]), max(b.stride(0), b.shape[1]))
    flags = (int(a_transposed), int(b_transposed), kind, kind, torch.get_num_threads())
    library.call("moestro_matmul", out, a, b, m, n, k, *strides, *flags)
    return out


def linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, K], weight [M, K] -> [N, M]."""
    return matmul(with_whole_rows(x), weight.contiguous(), b_transposed=True)


def linear_backward(d_out: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, empty where they are not wanted."""
    d_out, x = with_whole_rows(d_out), with_whole_rows(x)
    return (
        matmul(d_out, weight.contiguous()) if wanted[0] else x.new_empty(0),
        matmul(d_out, x, a_transposed=True) if wanted[1] else x.new_empty(0),
    )


def with_whole_rows(x: Tensor) -> Tensor:
    """x [N, K] as it lies, if the values of a row lie next to each other, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fused.cross_entropy`."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    nll = torch.empty(len(hidden), dtype=torch.float32)
    argmax = torch.empty_like(targets)
    d_hidden = torch.empty_like(hidden if with_grad else hidden[:0])
    d_weight = torch.zeros_like(weight if with_grad else weight[:0], dtype=torch.float32)
    gradients = (d_hidden, d_weight) if with_grad else (None, None)
    by_row = None if row_weights is None else row_weights.float().contiguous()
    if by_row is not None and by_row.shape != targets.shape:
        raise ValueError(f"row weights {list(by_row.shape)} for targets {list(targets.shape)}")
    sizes = (len(hidden), *weight.shape, library.TYPES[hidden.dtype], torch.get_num_threads())
    library.call("moestro_cross_entropy", nll, argmax, *gradients, hidden, weight, targets, by_row, *sizes)
    return nll, argmax, d_hidden, d_weight


def experts_forward(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """See `fused.experts_forward`."""
    (n, hidden), top_k, (num_experts, _, width) = x.shape, ids.shape[1], down.shape
    x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
    order, inverse, bounds = sort_by_expert(ids, num_experts)
    token, by_slot = order // top_k, weights.flatten()[order].float()
    h, y = x.new_empty(len(order), 2 * width), x.new_empty(len(order), hidden)
    sizes = (num_experts, n, hidden, width, library.TYPES[x.dtype], torch.get_num_threads())
    library.call("moestro_experts_forward", y, h, x, gate_up, down, token, by_slot, bounds, *sizes)
    return _combine(y, inverse, bounds, top_k), h, order, inverse, bounds


def experts_backward(
    d_out: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, saved: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fused.experts_backward`."""
    h, order, inverse, bounds = saved
    (n, hidden), top_k, (num_experts, _, width) = x.shape, weights.shape[1], down.shape
    x, gate_up, down, d_out = x.contiguous(), gate_up.contiguous(), down.contiguous(), d_out.contiguous()
    token, by_slot = order // top_k, weights.flatten()[order].float()
    dx, d_weights = x.new_empty(len(order), hidden), torch.zeros_like(by_slot)
    d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
    gradients = (dx, d_weights, d_gate_up, d_down)
    sizes = (num_experts, n, hidden, width, library.TYPES[x.dtype], torch.get_num_threads())
    operands = (d_out, x, h, gate_up, down, token, by_slot, bounds)
    library.call("moestro_experts_backward", *gradients, *operands, *sizes)
    by_choice = d_weights[inverse].view(weights.shape).to(weights.dtype)
    return _combine(dx, inverse, bounds, top_k), d_gate_up, d_down, by_choice


def _combine(slots: Tensor, inverse: Tensor, bounds: Tensor, top_k: int) -> Tensor:
    """Sum the slots of every token: slots [N·A, D], inverse [N·A] the slot of each choice -> [N, D].

    Slots from bounds[-1] on are of choices that are not carried out: they are not read.
    """
    num_tokens, hidden = len(inverse) // top_k, slots.shape[1]
    out = slots.new_empty(num_tokens, hidden)
    sizes = (num_tokens, top_k, int(bounds[-1]), hidden, library.TYPES[slots.dtype], torch.get_num_threads())
    library.call("moestro_combine", out, slots, inverse, *sizes)
    return out
