"""Attention of packed documents through the compiled kernels (`csrc/training/flash.h`), forward and backward.

softmax(scale · q kᵀ) v over the causal part of every document. Only one block of scores exists at a time, so memory is
linear in the number of tokens. The backward pass keeps inputs, output, and for every row the logarithm of the sum that
its softmax divides by. Inputs are read in place, through the strides of their rows and heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.ops import library


def attention_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.packed_attention` -> (out [N, H, V], log sums [H, N] fp32)."""
    q, k, v = (_with_whole_vectors(t) for t in (q, k, v))
    (n, num_heads, key_width), (_, num_kv_heads, value_width) = q.shape, v.shape
    if k.shape != (n, num_kv_heads, key_width) or len(v) != n:
        raise ValueError(f"cannot attend: queries {[*q.shape]}, keys {[*k.shape]}, values {[*v.shape]}")
    out, log_sums = q.new_empty(n, num_heads, value_width), torch.empty(num_heads, n)
    operands = (q, k, v, starts.contiguous(), _strides(q, k, v))
    library.call("moestro_flash_forward", out, log_sums, *operands, *_sizes(q, v, starts, scale))
    return out, log_sums


def attention_backward(
    d_out: Tensor, heads: tuple[Tensor, Tensor, Tensor], kept: tuple[Tensor, Tensor], starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `kept` is what the forward pass returned."""
    d_out, q, k, v = (_with_whole_vectors(t) for t in (d_out, *heads))
    out, log_sums = kept
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    operands = (d_out, q, k, v, out.contiguous(), log_sums, starts.contiguous(), _strides(q, k, v, d_out))
    library.call("moestro_flash_backward", dq, dk, dv, *operands, *_sizes(q, v, starts, scale))
    return dq, dk, dv


def _sizes(q: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[int | float, ...]:
    (n, num_heads, key_width), (_, num_kv_heads, value_width) = q.shape, v.shape
    sizes = (len(starts) - 1, n, num_heads, num_kv_heads, key_width, value_width)
    return (*sizes, scale, library.TYPES[q.dtype], torch.get_num_threads())


def _with_whole_vectors(heads: Tensor) -> Tensor:
    """heads [N, H, width] itself if each head is contiguous, else a copy."""
    return heads if heads.stride(-1) == 1 or heads.shape[-1] == 1 else heads.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([stride for t in tensors for stride in t.stride()[:2]])
