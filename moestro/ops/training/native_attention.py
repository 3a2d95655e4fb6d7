"""Attention of packed documents through the compiled kernels (`csrc/training/flash.h`), forward and backward.

softmax(scale · q kᵀ) v over the causal part of every document, without ever holding more of the scores than a block:
memory is linear in the number of tokens. Kept for the backward pass: inputs, output, and of every row the logarithm of
the sum that its softmax divides by. Inputs are read where they lie, through the strides of their rows and heads. Where
the kernels cannot run, `fused.py` computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.training import fused


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """See `reference.packed_attention`."""
    if library.load_library() is None or not library.fits(q, k, v):
        return fused.packed_attention(q, k, v, starts, scale)
    out: Tensor = _PackedAttention.apply(q, k, v, tuple(starts), scale)
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], scale: float) -> Tensor:
        q, k, v = (_with_whole_vectors(t) for t in (q, k, v))
        (n, num_heads, key_width), (_, num_kv_heads, value_width) = q.shape, v.shape
        if k.shape != (n, num_kv_heads, key_width) or len(v) != n:
            raise ValueError(f"cannot attend: queries {[*q.shape]}, keys {[*k.shape]}, values {[*v.shape]}")
        bounds = torch.tensor(starts)
        out, log_sums = q.new_empty(n, num_heads, value_width), torch.empty(num_heads, n)
        sizes = (len(starts) - 1, n, num_heads, num_kv_heads, key_width, value_width, scale, library.TYPES[q.dtype])
        threads = torch.get_num_threads()
        library.call("moestro_flash_forward", out, log_sums, q, k, v, bounds, _strides(q, k, v), *sizes, threads)
        ctx.save_for_backward(q, k, v, out, log_sums, bounds)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, bounds = ctx.saved_tensors
        d_out, threads = _with_whole_vectors(grads[0]), torch.get_num_threads()
        gradients = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        inputs = (d_out, q, k, v, out, log_sums, bounds, _strides(q, k, v, d_out))
        library.call("moestro_flash_backward", *gradients, *inputs, *ctx.sizes, threads)
        return *gradients, None, None


def _with_whole_vectors(heads: Tensor) -> Tensor:
    """heads [N, H, width] as they lie, if the values of a head lie next to each other, else a copy."""
    return heads if heads.stride(-1) == 1 or heads.shape[-1] == 1 else heads.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([stride for t in tensors for stride in t.stride()[:2]])
