"""The operations of training on the compiled kernels: products, experts, and the head with its cross-entropy.

Where the kernels cannot run, or a call is too small to pay for packing its weights, `fused.py` computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.training import fused

Matrices = Tensor | Sequence[Tensor]  # of all experts: a stack, or one each, wherever it lies

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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.linear`."""
    worth_packing = x.numel() >= MIN_ROWS * x.shape[-1]
    if (
        not worth_packing
        or not library.fits(x, weight)
        or library.load_library() is None
        or not library.multiplies_faster(x.dtype)
    ):
        return fused.linear(x, weight)
    return run_linear(x, weight)


def run_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The kernels themselves; see `reference.linear`."""
    out: Tensor = _Linear.apply(x, weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]), weight.contiguous()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.shape = x.shape
        return matmul(rows, weight, b_transposed=True).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        d_out = grads[0].reshape(-1, len(weight))
        d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
        wanted_x, wanted_weight = ctx.needs_input_grad
        return (
            matmul(d_out, weight).view(ctx.shape) if wanted_x else None,
            matmul(d_out, rows, a_transposed=True) if wanted_weight else None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_cross_entropy`."""
    if (
        not library.fits(hidden, weight)
        or library.load_library() is None
        or not library.multiplies_faster(hidden.dtype)
    ):
        return fused.linear_cross_entropy(hidden, weight, targets)
    return run_linear_cross_entropy(hidden, weight, targets)


def run_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels themselves; see `reference.linear_cross_entropy`."""
    total, nll, argmax = _LinearCrossEntropy.apply(hidden, weight, targets)
    return total, nll, argmax


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
        nll = torch.empty(len(hidden), dtype=torch.float32)
        argmax = torch.empty_like(targets)
        d_hidden, d_weight = None, None
        if any(ctx.needs_input_grad):
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros(weight.shape, dtype=torch.float32)
        sizes = (len(hidden), *weight.shape, library.TYPES[hidden.dtype], torch.get_num_threads())
        library.call("moestro_cross_entropy", nll, argmax, d_hidden, d_weight, hidden, weight, targets, *sizes)
        ctx.mark_non_differentiable(nll, argmax)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return nll.sum(), nll, argmax

    backward = fused._LinearCrossEntropy.backward


def grouped_experts(x: Tensor, gate_up: Matrices, down: Matrices, ids: Tensor, weights: Tensor) -> Tensor:
    """See `reference.grouped_experts`; gate_up and down may also be a matrix [2F, D] and [D, F] for every expert."""
    worth_packing = ids.numel() >= MIN_LOAD * len(down)
    if not worth_packing or library.load_library() is None or not library.fits(x, *_parts(gate_up), *_parts(down)):
        return fused.grouped_experts(x, _stack(gate_up), _stack(down), ids, weights)
    return run_experts(x, gate_up, down, ids, weights)


def run_experts(x: Tensor, gate_up: Matrices, down: Matrices, ids: Tensor, weights: Tensor) -> Tensor:
    """The kernels themselves, for any number of tokens; see `grouped_experts`."""
    out: Tensor = _GroupedExperts.apply(x, ids, weights, *_parts(gate_up), *_parts(down))
    return out


def _parts(matrices: Matrices) -> Sequence[Tensor]:
    return [matrices] if isinstance(matrices, Tensor) else matrices


def _stack(matrices: Matrices) -> Tensor:
    return matrices if isinstance(matrices, Tensor) else torch.stack(list(matrices))


def _addresses(parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Addresses [E] of contiguous matrices of one shape, or of those of one stack; ValueError for other shapes."""
    if any(part.shape[-2:] != shape or part.dim() != parts[0].dim() for part in parts):
        raise ValueError(f"experts of {[list(part.shape) for part in parts[:3]]} where each is {list(shape)}")
    if parts[0].dim() == 2:
        return torch.tensor([part.data_ptr() for part in parts])
    (stack,) = parts
    return torch.arange(len(stack)).mul_(shape[0] * shape[1] * stack.itemsize).add_(stack.data_ptr())


class _GroupedExperts(torch.autograd.Function):
    """x, ids, weights, then the matrices of gate_up and of down: one stack each, or one matrix for every expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, *matrices: Tensor) -> Tensor:
        x, matrices = x.contiguous(), tuple(matrix.contiguous() for matrix in matrices)
        half = len(matrices) // 2
        (n, hidden), top_k, width = x.shape, ids.shape[1], matrices[-1].shape[-1]
        ctx.shapes = (2 * width, hidden), (hidden, width)
        gate_up, down = _addresses(matrices[:half], ctx.shapes[0]), _addresses(matrices[half:], ctx.shapes[1])
        if len(gate_up) != len(down):
            raise ValueError(f"{len(gate_up)} matrices of gate and up for {len(down)} of down")
        order, inverse, bounds = fused.sort_by_expert(ids, len(down))
        token, by_slot = order // top_k, weights.flatten()[order].float()
        offsets, slots = torch.tensor(bounds), bounds[-1]
        h, y = x.new_empty(slots, 2 * width), x.new_empty(slots, hidden)
        sizes = (len(down), n, hidden, width, library.TYPES[x.dtype], torch.get_num_threads())
        library.call("moestro_experts_forward", y, h, x, gate_up, down, token, by_slot, offsets, *sizes)
        ctx.save_for_backward(x, h, token, by_slot, offsets, inverse, *matrices)
        ctx.sizes, ctx.shape, ctx.weights_dtype = sizes, ids.shape, weights.dtype
        return _combine(y, inverse, ids.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, token, by_slot, offsets, inverse, *matrices = ctx.saved_tensors
        half, d_out = len(matrices) // 2, grads[0].contiguous()
        dx, d_weights = x.new_empty(len(h), x.shape[1]), by_slot.new_zeros(len(by_slot))
        gradients = [torch.empty_like(matrix) for matrix in matrices]
        gate_up, down, d_gate_up, d_down = (
            _addresses(parts[side], shape)
            for parts in (matrices, gradients)
            for side, shape in zip((slice(half), slice(half, None)), ctx.shapes, strict=True)
        )
        where = (gate_up, down, token, by_slot, offsets)
        library.call("moestro_experts_backward", dx, d_weights, d_gate_up, d_down, d_out, x, h, *where, *ctx.sizes)
        by_choice = d_weights[inverse].view(ctx.shape).to(ctx.weights_dtype)
        return _combine(dx, inverse, ctx.shape), None, by_choice, *gradients


def _combine(slots: Tensor, inverse: Tensor, shape: torch.Size) -> Tensor:
    """Sum the slots of every token: slots [S, D], inverse [N·A] the slot of each choice -> [N, D]."""
    (num_tokens, top_k), (num_slots, hidden) = shape, slots.shape
    out = slots.new_empty(num_tokens, hidden)
    sizes = (num_tokens, top_k, num_slots, hidden, library.TYPES[slots.dtype], torch.get_num_threads())
    library.call("moestro_combine", out, slots, inverse, *sizes)
    return out
