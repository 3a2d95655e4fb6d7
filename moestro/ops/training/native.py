"""The large operations of training on the compiled kernels, forward and backward, as functions of tensors.

`operators.py` calls them if they can run and pay; `fused.py` computes the same in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.training.fused import Matrices, sort_by_expert

MIN_LOAD = 8  # choices per expert; with fewer, packing its weights in every call costs more than it saves
MIN_ROWS = 32  # rows of a linear layer, for the same reason


def matmul(a: Tensor, b: Tensor, *, a_transposed: bool = False, b_transposed: bool = False) -> Tensor:
    """a [M, K] (transposed: [K, M]), b [K, N] (or [N, K]), rows contiguous -> [M, N] in their type, sums in fp32."""
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
    """Gradients of x and weight; empty if not wanted."""
    d_out, x = with_whole_rows(d_out), with_whole_rows(x)
    return (
        matmul(d_out, weight.contiguous()) if wanted[0] else x.new_empty(0),
        matmul(d_out, x, a_transposed=True) if wanted[1] else x.new_empty(0),
    )


def with_whole_rows(x: Tensor) -> Tensor:
    """x [N, K] itself if each row is contiguous, else a copy."""
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


def experts_forward(x: Tensor, gate_up: Matrices, down: Matrices, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """See `fused.experts_forward`. The kernels get an address for every expert."""
    (n, hidden), top_k, width = x.shape, ids.shape[1], down[0].shape[-1]
    x, gate_up, down = x.contiguous(), [t.contiguous() for t in gate_up], [t.contiguous() for t in down]
    tables = addresses(gate_up, (2 * width, hidden)), addresses(down, (hidden, width))
    num_experts = len(tables[1])
    if len(tables[0]) != num_experts:
        raise ValueError(f"{len(tables[0])} matrices of gate and up for {num_experts} of down")
    order, inverse, bounds = sort_by_expert(ids, num_experts)
    token, by_slot = order // top_k, weights.flatten()[order].float()
    h, y = x.new_empty(len(order), 2 * width), x.new_empty(len(order), hidden)
    sizes = (num_experts, n, hidden, width, library.TYPES[x.dtype], torch.get_num_threads())
    library.call("moestro_experts_forward", y, h, x, *tables, token, by_slot, bounds, *sizes)
    return combine(y, inverse, bounds, top_k), h, order, inverse, bounds


def experts_backward(
    d_out: Tensor,
    x: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    weights: Tensor,
    saved: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `fused.experts_backward`."""
    h, order, inverse, bounds = saved
    (n, hidden), top_k, width = x.shape, weights.shape[1], down[0].shape[-1]
    x, d_out = x.contiguous(), d_out.contiguous()
    gate_up, down = [t.contiguous() for t in gate_up], [t.contiguous() for t in down]
    gradients = [[torch.empty_like(t) for t in side] for side in (gate_up, down)]
    shapes = (2 * width, hidden), (hidden, width)
    of_weights, of_gradients = (
        [addresses(side, shape) for side, shape in zip(sides, shapes, strict=True)]
        for sides in ((gate_up, down), gradients)
    )
    token, by_slot = order // top_k, weights.flatten()[order].float()
    dx, d_weights = x.new_empty(len(order), hidden), torch.zeros_like(by_slot)
    sizes = (len(of_weights[1]), n, hidden, width, library.TYPES[x.dtype], torch.get_num_threads())
    operands = (*of_gradients, d_out, x, h, *of_weights, token, by_slot, bounds)
    library.call("moestro_experts_backward", dx, d_weights, *operands, *sizes)
    by_choice = d_weights[inverse].view(weights.shape).to(weights.dtype)
    return combine(dx, inverse, bounds, top_k), by_choice, [*gradients[0], *gradients[1]]


def addresses(parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Addresses [E] of contiguous matrices, given one by one or as one stack; ValueError for other shapes."""
    if any(part.shape[-2:] != shape or part.dim() != parts[0].dim() for part in parts):
        raise ValueError(f"experts of {[list(part.shape) for part in parts[:3]]} where each is {list(shape)}")
    if parts[0].dim() == 2:
        return torch.tensor([part.data_ptr() for part in parts])
    (stack,) = parts
    return torch.arange(len(stack)).mul_(shape[0] * shape[1] * stack.itemsize).add_(stack.data_ptr())


def combine(slots: Tensor, inverse: Tensor, bounds: Tensor, top_k: int) -> Tensor:
    """Sum the slots of every token: slots [N·A, D], inverse [N·A] the slot of each choice -> [N, D].

    Slots from bounds[-1] on belong to dropped choices and are not read.
    """
    num_tokens, hidden = len(inverse) // top_k, slots.shape[1]
    out = slots.new_empty(num_tokens, hidden)
    sizes = (num_tokens, top_k, int(bounds[-1]), hidden, library.TYPES[slots.dtype], torch.get_num_threads())
    library.call("moestro_combine", out, slots, inverse, *sizes)
    return out
