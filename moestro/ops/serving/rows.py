"""Serving operations on rows: norms, activations, rotations, and the choice of experts.

A row of the result depends on its own inputs alone, bit for bit. The kernels are in csrc/math/rows.h and
csrc/serving/serve_rows.h; if they cannot run, `reference.py` computes the same within rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.abi import SCORES
from moestro.ops.serving import reference
from moestro.routing.selection import Selection


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis, in fp32. x [..., D], weight [D] -> [..., D] of x's type."""
    if not library.serves(x) or weight.dtype not in library.TYPES:
        return reference.rms_norm(x, weight, eps)
    x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    sizes = (x.numel() // max(width, 1), width, eps, library.TYPES[x.dtype], library.TYPES[weight.dtype])
    library.call("moestro_rms_norm", out, x, weight, *sizes, torch.get_num_threads())
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up. gate_up [N, 2F], gates first -> [N, F] of its type."""
    if not library.serves(gate_up):
        return reference.swiglu(gate_up)
    gate_up = gate_up.contiguous()
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, width)
    sizes = (n, width, library.TYPES[gate_up.dtype], torch.get_num_threads())
    library.call("moestro_swiglu", out, gate_up, *sizes)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate pairs (x0, x1), (x2, x3), … of x [N, ..., R] by cos and sin [N, R/2].

    In fp32, whatever the type of x. x may have any strides except along the last axis. `inverse` rotates back, which is
    also the gradient.
    """
    if not library.serves(x) or not x.numel() or {cos.dtype, sin.dtype} != {torch.float32}:
        return reference.rope(x, cos, -sin if inverse else sin)
    vectors = x.flatten(1, -2) if x.dim() > 2 else x[:, None]  # [N, G, R], a copy if no strides fit
    vectors = vectors if vectors.stride(2) == 1 and vectors.stride(1) >= vectors.shape[2] else vectors.contiguous()
    (n, groups, width), cos, sin = vectors.shape, cos.contiguous(), sin.contiguous()
    if cos.shape != (n, width // 2) or sin.shape != cos.shape or width % 2:
        raise ValueError(f"angles {list(cos.shape)} and {list(sin.shape)} for vectors {list(x.shape)}")
    out = x.new_empty(x.shape)
    row = max(vectors.stride(0), (groups - 1) * vectors.stride(1) + width)  # of one row torch may report any stride
    strides = (groups * width, width, row, vectors.stride(1))
    kinds = (int(inverse), library.TYPES[x.dtype], torch.get_num_threads())
    library.call("moestro_rope", out, vectors, cos, sin, n, groups, width, *strides, *kinds)
    return out


def route(logits: Tensor, selection: Selection, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [N, E] fp32 -> ids [N, A] int64 and weights [N, A] fp32.

    `ids` [N, A] are experts already known: only their weights are computed. Rows of −1 are still to be chosen.
    """
    n, num_experts = logits.shape
    if not library.serves(logits) or logits.dtype != torch.float32 or selection.score not in SCORES:
        return reference.route(logits, selection, ids)
    logits = logits.contiguous()
    given = ids is not None
    ids = (
        logits.new_empty(n, selection.top_k, dtype=torch.int64)
        if ids is None
        else ids.clone(memory_format=torch.contiguous_format)
    )
    if ids.shape != (n, selection.top_k) or selection.bias.shape != (num_experts,):
        raise ValueError(f"ids {list(ids.shape)} or bias {list(selection.bias.shape)} do not fit {list(logits.shape)}")
    weights = logits.new_empty(n, selection.top_k)
    sizes = (n, num_experts, selection.num_groups, selection.top_k_groups, selection.top_k)
    kinds = (SCORES[selection.score], selection.group_best, selection.multiply, selection.normalize, given)
    bias = selection.bias.float().contiguous()
    threads = torch.get_num_threads()
    library.call("moestro_route", ids, weights, logits, bias, *sizes, selection.scale, *kinds, threads)
    return ids, weights
