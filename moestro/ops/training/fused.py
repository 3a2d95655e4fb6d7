"""The fused operations in plain torch with hand-written backward passes.

What makes them faster than `reference.py` on a CPU: tokens are sorted by expert once and each expert works on a
slice that stays in cache; results are written into preallocated buffers; sums over a token's experts are gathers,
never scattered additions, so results are deterministic; attention touches only the causal blocks of each document;
the head never keeps full logits. Every buffer is one that the next call of the same shape can use again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128  # query rows of one attention block: scores of 4 heads × 128 × 512 stay in L2
VOCAB_CHUNK = 1024  # token rows whose logits exist at one time


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.linear`."""
    return F.linear(x, weight)


def grouped_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """See `reference.grouped_experts`."""
    out: Tensor = _GroupedExperts.apply(x, gate_up, down, ids, weights)
    return out


def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """ids [N, A] -> (order [N·A] of flat slots by expert, inverse [N·A], E + 1 bounds of slices).

    Slots of id E, choices that are not carried out, come last and belong to no slice.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(flat, minlength=num_experts)
    return order, inverse, [0, *counts[:num_experts].cumsum(0).tolist()]


def _expert_slices(offsets: list[int]) -> Iterator[tuple[int, slice]]:
    for expert, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end > start:
            yield expert, slice(start, end)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (n, width), top_k = x.shape, ids.shape[1]
        order, inverse, offsets = sort_by_expert(ids, gate_up.shape[0])
        xs = x.index_select(0, order // top_k)
        ws = weights.flatten()[order].to(x.dtype)[:, None]
        h = x.new_empty(len(order), gate_up.shape[1])
        y = torch.empty_like(xs)
        for e, rows in _expert_slices(offsets):
            torch.mm(xs[rows], gate_up[e].T, out=h[rows])
            gate, up = h[rows].chunk(2, dim=-1)
            act = F.silu(gate).mul_(up).mul_(ws[rows])
            torch.mm(act, down[e].T, out=y[rows])
        y[offsets[-1] :] = 0
        ctx.save_for_backward(x, gate_up, down, weights, order, inverse, h)
        ctx.offsets = offsets
        return y.index_select(0, inverse).view(n, top_k, width).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, order, inverse, h = ctx.saved_tensors
        (n, width), top_k = x.shape, len(order) // len(x)
        token = order // top_k
        xs, dy = x.index_select(0, token), grads[0].index_select(0, token)
        ws = weights.flatten()[order].to(x.dtype)[:, None]
        dxs, dws = torch.empty_like(xs), weights.new_empty(len(order))
        d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, rows in _expert_slices(ctx.offsets):
            gate, up = h[rows].chunk(2, dim=-1)
            silu = F.silu(gate)
            act = silu * up
            torch.mm(dy[rows].T, act * ws[rows], out=d_down[e])
            d_act = torch.mm(dy[rows], down[e])
            dws[rows] = (d_act * act).sum(-1, dtype=dws.dtype)
            d_act.mul_(ws[rows])
            dh = torch.empty_like(h[rows])
            d_gate, d_up = dh.chunk(2, dim=-1)
            torch.mul(d_act, silu, out=d_up)
            d_gate.copy_(torch.ops.aten.silu_backward(d_act.mul_(up), gate))
            torch.mm(dh, gate_up[e], out=dxs[rows])
            torch.mm(dh.T, xs[rows], out=d_gate_up[e])
        dxs[ctx.offsets[-1] :] = 0
        dws[ctx.offsets[-1] :] = 0
        dx = dxs.index_select(0, inverse).view(n, top_k, width).sum(1)
        d_weights = dws[inverse].view(n, top_k).to(weights.dtype)
        return dx, d_gate_up, d_down, None, d_weights


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """See `reference.packed_attention`."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    out: Tensor = _PackedAttention.apply(q, k, v, tuple(starts), scale)
    return out


def _attention_blocks(starts: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """(query rows, key rows) of every block; keys start with the document and end with the block's last query."""
    for start, end in itertools.pairwise(starts):
        for first in range(start, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            yield slice(first, last), slice(start, last)


def _block_probabilities(q: Tensor, k: Tensor, future: Tensor) -> Tensor:
    """softmax of q kᵀ [H, m, S] under the causal mask; `future` is `_future_mask`."""
    scores = torch.bmm(q, k.transpose(1, 2))
    rows = q.shape[1]
    scores[:, :, -rows:].add_(future[:rows, :rows])
    return scores.softmax(-1)


def _future_mask(like: Tensor) -> Tensor:
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


class _PackedAttention(torch.autograd.Function):
    """Heads first inside; probabilities are computed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], scale: float) -> Tensor:
        q, k, v = (q * scale).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        future = _future_mask(q)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for rows, keys in _attention_blocks(starts):
            out[:, rows] = torch.bmm(_block_probabilities(q[:, rows], k[:, keys], future), v[:, keys])
        ctx.save_for_backward(q, k, v)
        ctx.starts, ctx.scale = starts, scale
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        d_out = grads[0].transpose(0, 1)
        future = _future_mask(q)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (k, v))
        for rows, keys in _attention_blocks(ctx.starts):
            p = _block_probabilities(q[:, rows], k[:, keys], future)
            dv[:, keys] += torch.bmm(p.transpose(1, 2), d_out[:, rows])
            dp = torch.bmm(d_out[:, rows], v[:, keys].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = torch.bmm(ds, k[:, keys])
            dk[:, keys] += torch.bmm(ds.transpose(1, 2), q[:, rows])
        return dq.mul_(ctx.scale).transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_cross_entropy`."""
    total, nll, argmax = _LinearCrossEntropy.apply(hidden, weight, targets)
    return total, nll, argmax


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed while a chunk's logits exist, so that no logits are kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        argmax = torch.empty_like(targets)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
        for start in range(0, len(hidden), VOCAB_CHUNK):
            rows = slice(start, min(start + VOCAB_CHUNK, len(hidden)))
            logits = F.linear(hidden[rows], weight).float()
            valid = targets[rows] >= 0
            target = targets[rows].clamp(min=0)[:, None]
            top, argmax[rows] = logits.max(-1)
            picked = logits.gather(1, target)[:, 0]
            p = logits.sub_(top[:, None]).exp_()
            sums = p.sum(-1)
            nll[rows] = (sums.log() + top - picked).masked_fill_(~valid, 0.0)
            if d_hidden is None or d_weight is None:
                continue
            p.mul_((valid / sums)[:, None])
            p.scatter_add_(1, target, -valid[:, None].to(p.dtype))
            d_logits = p.to(hidden.dtype)
            torch.mm(d_logits, weight, out=d_hidden[rows])
            d_weight += torch.mm(d_logits.T, hidden[rows])
        ctx.mark_non_differentiable(nll, argmax)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return nll.sum(), nll, argmax

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        return d_hidden * scale.to(d_hidden.dtype), (d_weight * scale).to(ctx.weight_dtype), None
