"""The small operations of a training step on kernels (`csrc/training/train_rows.h`): one pass forward, one back.

Where the kernels are not built, or a tensor is neither fp32 nor bf16 in CPU memory, `reference.py` computes the same.
Rows are computed in fp32 whatever their type and rounded once; parameters keep their own type. Gradients that are sums
over rows are taken in an order that neither threads nor anything else but the number of rows decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.training import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if library.load_library() is None or not library.fits(x) or not library.fits(weight):
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rows, width = _rows(x)
        ctx.numbers = (rows, width, eps, library.TYPES[x.dtype], library.TYPES[weight.dtype], torch.get_num_threads())
        out = torch.empty_like(x)
        library.call("moestro_rms_norm", out, x, weight, *ctx.numbers)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
        library.call("moestro_rms_norm_backward", dx, d_weight, grads[0].contiguous(), x, weight, *ctx.numbers)
        return dx, d_weight, None


def swiglu(gate_up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    if library.load_library() is None or not library.fits(gate_up):
        return reference.swiglu(gate_up)
    out: Tensor = _SwiGLU.apply(gate_up)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, width = _rows(gate_up)
        ctx.numbers = (rows, width // 2, library.TYPES[gate_up.dtype], torch.get_num_threads())
        out = gate_up.new_empty(*gate_up.shape[:-1], width // 2)
        library.call("moestro_swiglu", out, gate_up, *ctx.numbers)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        library.call("moestro_swiglu_backward", d_gate_up, grads[0].contiguous(), gate_up, *ctx.numbers)
        return d_gate_up


def join_heads(plain: Tensor, rotary: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """See `reference.join_heads`."""
    if (
        library.load_library() is None
        or not library.fits(plain, rotary)
        or not library.fits(*tables)
        or tables[0].dtype != torch.float32
    ):
        return reference.join_heads(plain, rotary, tables)
    out: Tensor = _JoinHeads.apply(plain, rotary, *tables)
    return out


class _JoinHeads(torch.autograd.Function):
    """Reads both parts where they lie, in whatever they were split from."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, heads, plain_width = plain.shape
        rotary_width = rotary.shape[-1]
        if not _fits_heads(plain, rotary, cos, sin):
            raise ValueError(f"cannot join heads {[list(t.shape) for t in (plain, rotary, cos, sin)]}")
        plain, rotary = (t if t.stride(-1) == 1 else t.contiguous() for t in (plain, rotary))
        cos, sin = cos.contiguous(), sin.contiguous()
        shared = rotary.dim() == 2
        sizes, kind = (rows, heads, plain_width, rotary_width), (library.TYPES[plain.dtype], torch.get_num_threads())
        strides = (*plain.stride()[:2], rotary.stride(0), 0 if shared else rotary.stride(1))
        out = plain.new_empty(rows, heads, plain_width + rotary_width)
        library.call("moestro_join_heads", out, plain, rotary, cos, sin, *sizes, *strides, *kind)
        ctx.save_for_backward(cos, sin)
        ctx.shapes, ctx.numbers = (plain.shape, rotary.shape), (*sizes, int(shared), *kind)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        d_plain, d_rotary = (grads[0].new_empty(shape) for shape in ctx.shapes)
        library.call("moestro_split_heads", d_plain, d_rotary, grads[0].contiguous(), cos, sin, *ctx.numbers)
        return d_plain, d_rotary, None, None


def _rows(x: Tensor) -> tuple[int, int]:
    """How many rows of the last axis, and how wide."""
    width = x.shape[-1]
    return x.numel() // width if width else 0, width


def _fits_heads(plain: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor) -> bool:
    per_head = rotary.dim() == 2 or rotary.shape[1] == plain.shape[1]
    pairs = cos.shape == sin.shape and rotary.shape[-1] == 2 * cos.shape[-1]
    return len(rotary) == len(plain) == len(cos) and per_head and pairs
