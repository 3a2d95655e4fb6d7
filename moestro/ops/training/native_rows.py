"""The small operations of a training step on kernels (`csrc/training/train_rows.h`): one pass forward, one back.

Rows are computed in fp32, whatever their type, and rounded once; parameters keep their own type. Gradients that sum
over rows do so in an order that depends on the number of rows alone, not on threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.ops import library


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    library.call("moestro_rms_norm", out, x, weight, *_norm_numbers(x, weight, eps))
    return out


def rms_norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    x, weight = x.contiguous(), weight.contiguous()
    dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
    numbers = _norm_numbers(x, weight, eps)
    library.call("moestro_rms_norm_backward", dx, d_weight, d_out.contiguous(), x, weight, *numbers)
    return dx, d_weight


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    gate_up = gate_up.contiguous()
    rows, width = _rows(gate_up)
    out = gate_up.new_empty(*gate_up.shape[:-1], width // 2)
    library.call(
        "moestro_swiglu", out, gate_up, rows, width // 2, library.TYPES[gate_up.dtype], torch.get_num_threads()
    )
    return out


def swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up."""
    gate_up = gate_up.contiguous()
    rows, width = _rows(gate_up)
    d_gate_up = torch.empty_like(gate_up)
    numbers = (rows, width // 2, library.TYPES[gate_up.dtype], torch.get_num_threads())
    library.call("moestro_swiglu_backward", d_gate_up, d_out.contiguous(), gate_up, *numbers)
    return d_gate_up


def join_heads_forward(plain: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.join_heads`. Reads both parts in place, from the tensors they were split from."""
    if not _fits_heads(plain, rotary, cos, sin):
        raise ValueError(f"cannot join heads {[list(t.shape) for t in (plain, rotary, cos, sin)]}")
    plain, rotary = (t if t.stride(-1) == 1 else t.contiguous() for t in (plain, rotary))
    sizes = (*plain.shape, rotary.shape[-1])
    strides = (*plain.stride()[:2], rotary.stride(0), 0 if rotary.dim() == 2 else rotary.stride(1))
    out = plain.new_empty(*plain.shape[:2], plain.shape[2] + rotary.shape[-1])
    kind = (library.TYPES[plain.dtype], torch.get_num_threads())
    library.call("moestro_join_heads", out, plain, rotary, cos.contiguous(), sin.contiguous(), *sizes, *strides, *kind)
    return out


def join_heads_backward(d_out: Tensor, cos: Tensor, sin: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Gradients of plain and rotary; `shared` means one rotary part for all heads."""
    rows, heads, width = d_out.shape
    rotary_width = 2 * cos.shape[-1]
    sizes = (rows, heads, width - rotary_width, rotary_width)
    d_plain = d_out.new_empty(*sizes[:3])
    d_rotary = d_out.new_empty((rows, rotary_width) if shared else (rows, heads, rotary_width))
    kind = (int(shared), library.TYPES[d_out.dtype], torch.get_num_threads())
    operands = (d_out.contiguous(), cos.contiguous(), sin.contiguous())
    library.call("moestro_split_heads", d_plain, d_rotary, *operands, *sizes, *kind)
    return d_plain, d_rotary


def _norm_numbers(x: Tensor, weight: Tensor, eps: float) -> tuple[int | float, ...]:
    return (*_rows(x), eps, library.TYPES[x.dtype], library.TYPES[weight.dtype], torch.get_num_threads())


def _rows(x: Tensor) -> tuple[int, int]:
    """Number of rows along the last axis, and their width."""
    width = x.shape[-1]
    return x.numel() // width if width else 0, width


def _fits_heads(plain: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor) -> bool:
    per_head = rotary.dim() == 2 or rotary.shape[1] == plain.shape[1]
    pairs = cos.shape == sin.shape and rotary.shape[-1] == 2 * cos.shape[-1]
    return len(rotary) == len(plain) == len(cos) and per_head and pairs
