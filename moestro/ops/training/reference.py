"""The specification of every fused operation, in plain torch that autograd differentiates.

Written to be read and trusted, not to be fast. Letters: N tokens, H heads, D model, E experts, A active,
F expert width, V vocabulary. `ops/training/fused.py` must agree with this file within rounding, forward and backward.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Σ_a weights[n,a] · Expert_ids[n,a](x[n]), each expert a SwiGLU FFN (V3 eq. 12).

    x [N, D], gate_up [E, 2F, D] (gate rows first), down [E, D, F], ids [N, A] int64, weights [N, A] fp32 -> [N, D].
    A choice with id E is dropped: it adds nothing.
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert].to(x.dtype)).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert].to(x.dtype))
        out = out.index_add(0, token, y * weights[token, slot, None].to(y.dtype))
    return out


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Causal attention inside each sequence of a packed batch.

    q [N, H, K], k [N, G, K], v [N, G, W]; query head h uses key head h · G // H; sequence s is rows
    starts[s]:starts[s+1], starts int64 [S + 1] -> [N, H, W].
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    out = [v.new_empty(0, *v.shape[1:])]
    for start, end in itertools.pairwise(starts.tolist()):
        qs, ks, vs = (t[start:end].transpose(0, 1) for t in (q, k, v))
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores = (qs @ ks.transpose(1, 2)).float() * scale
        p = scores.masked_fill(future, float("-inf")).softmax(-1)
        out.append((p.to(v.dtype) @ vs).transpose(0, 1))
    return torch.cat(out)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output head and cross-entropy in one.

    hidden [N, D], weight [V, D], targets [N] int64 (−100: none), row_weights w [N] fp32 or None for ones -> (Σ w · nll,
    differentiable; nll [N] in nats, 0 without a target; argmax [N] int64). The last two have no gradient.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    return (nll if row_weights is None else nll * row_weights).sum(), nll.detach(), logits.argmax(-1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K], weight [M, K] -> x Wᵀ [..., M] in the type of x."""
    return F.linear(x, weight.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis: x [..., D], weight [D] -> [..., D] in the precision of x."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: gate_up [..., 2F], gates first -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def join_heads(plain: Tensor, rotary: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Join a plain part of each head with a part rotated by its row's angles.

    plain [N, H, P], rotary [N, H, R] or [N, R] for all heads, tables (cos, sin) [N, R/2] -> [N, H, P + R].
    """
    turned = rotate(rotary, tables)
    if turned.dim() == 2:
        turned = turned[:, None].expand(-1, plain.shape[1], -1)
    return torch.cat([plain, turned], dim=-1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [N, ..., R] by its row's angles, in fp32 or wider; pairs (x0, x1), (x2, x3), … keep their places."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (t.to(wide.dtype).view(len(x), *[1] * (x.dim() - 2), x.shape[-1] // 2) for t in tables)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
