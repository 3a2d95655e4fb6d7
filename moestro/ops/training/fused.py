"""The large operations of training in plain torch, forward and backward, as functions of tensors (`operators.py`).

Why they are faster than `reference.py` on a CPU: tokens are sorted by expert once, and each expert works on a slice
that stays in cache. Results are written into preallocated buffers. Sums over a token's experts are gathers, never
scattered additions, so results are deterministic. Attention touches only the causal blocks of each document. The head
never keeps full logits. The next call of the same shape can reuse every buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128  # query rows per attention block: scores of 4 heads × 128 × 512 stay in L2
Matrices = Sequence[Tensor]
VOCAB_CHUNK = 1024  # token rows whose logits exist at a time


def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, A] -> (order [N·A] of flat choices by expert, inverse [N·A], bounds [E + 1] of the experts' slices).

    Dropped choices (id E) come last and belong to no slice. All int64.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=ids.device)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts]
    return order, inverse, F.pad(counts.cumsum(0), (1, 0))


def _expert_slices(bounds: Tensor) -> Iterator[tuple[int, slice]]:
    for expert, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        if end > start:
            yield expert, slice(start, end)


def one_each(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """The experts' matrices, given as a list of them or as a list of one stack [E, …]."""
    return matrices[0] if matrices[0].dim() == 3 else matrices  # type: ignore[return-value]


def experts_forward(x: Tensor, gate_up: Matrices, down: Matrices, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """See `reference.grouped_experts` -> (out [N, D], h [N·A, 2F] before the activation, order, inverse, bounds).

    gate_up and down: one stack, or one matrix per expert.
    """
    gate_ups, downs = one_each(gate_up), one_each(down)
    (n, width), top_k = x.shape, ids.shape[1]
    order, inverse, bounds = sort_by_expert(ids, len(downs))
    xs = x.index_select(0, order // top_k)
    ws = weights.flatten()[order].to(x.dtype)[:, None]
    h = x.new_empty(len(order), gate_ups[0].shape[0])
    y = torch.empty_like(xs)
    for e, rows in _expert_slices(bounds):
        torch.mm(xs[rows], gate_ups[e].T, out=h[rows])
        gate, up = h[rows].chunk(2, dim=-1)
        act = F.silu(gate).mul_(up).mul_(ws[rows])
        torch.mm(act, downs[e].T, out=y[rows])
    y[int(bounds[-1]) :] = 0
    return y.index_select(0, inverse).view(n, top_k, width).sum(1), h, order, inverse, bounds


def experts_backward(
    d_out: Tensor,
    x: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    weights: Tensor,
    saved: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`saved` is (h, order, inverse, bounds) of the forward pass -> gradients of x, weights, and all matrices."""
    h, order, inverse, bounds = saved
    gradients = [torch.zeros_like(t) for t in (*gate_up, *down)]
    gate_ups, downs = one_each(gate_up), one_each(down)
    d_gate_ups, d_downs = one_each(gradients[: len(gate_up)]), one_each(gradients[len(gate_up) :])
    (n, width), top_k = x.shape, weights.shape[1]
    token = order // top_k
    xs, dy = x.index_select(0, token), d_out.index_select(0, token)
    ws = weights.flatten()[order].to(x.dtype)[:, None]
    dxs, dws = torch.empty_like(xs), weights.new_empty(len(order))
    for e, rows in _expert_slices(bounds):
        gate, up = h[rows].chunk(2, dim=-1)
        silu = F.silu(gate)
        act = silu * up
        torch.mm(dy[rows].T, act * ws[rows], out=d_downs[e])
        d_act = torch.mm(dy[rows], downs[e])
        dws[rows] = (d_act * act).sum(-1, dtype=dws.dtype)
        d_act.mul_(ws[rows])
        dh = torch.empty_like(h[rows])
        d_gate, d_up = dh.chunk(2, dim=-1)
        torch.mul(d_act, silu, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_act.mul_(up), gate))
        torch.mm(dh, gate_ups[e], out=dxs[rows])
        torch.mm(dh.T, xs[rows], out=d_gate_ups[e])
    dxs[int(bounds[-1]) :] = 0
    dws[int(bounds[-1]) :] = 0
    dx = dxs.index_select(0, inverse).view(n, top_k, width).sum(1)
    return dx, dws[inverse].view(n, top_k).to(weights.dtype), gradients


def _attention_blocks(starts: Tensor) -> Iterator[tuple[slice, slice]]:
    """(query rows, key rows) of every block; keys start with the document and end with the block's last query."""
    for start, end in itertools.pairwise(starts.tolist()):
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


def attention_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.packed_attention` -> (out [N, H, V], nothing to keep). Heads first inside."""
    q, k, v = _heads_first(q, k, v, scale)
    future = _future_mask(q)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for rows, keys in _attention_blocks(starts):
        out[:, rows] = torch.bmm(_block_probabilities(q[:, rows], k[:, keys], future), v[:, keys])
    return out.transpose(0, 1).contiguous(), q.new_empty(0, dtype=torch.float32)


def attention_backward(
    d_out: Tensor, heads: tuple[Tensor, Tensor, Tensor], starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again, not kept."""
    groups = heads[1].shape[1]
    q, k, v = _heads_first(*heads, scale)
    d_out, future = d_out.transpose(0, 1), _future_mask(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    for rows, keys in _attention_blocks(starts):
        p = _block_probabilities(q[:, rows], k[:, keys], future)
        dv[:, keys] += torch.bmm(p.transpose(1, 2), d_out[:, rows])
        dp = torch.bmm(d_out[:, rows], v[:, keys].transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq[:, rows] = torch.bmm(ds, k[:, keys])
        dk[:, keys] += torch.bmm(ds.transpose(1, 2), q[:, rows])
    dk, dv = (t.unflatten(0, (groups, -1)).sum(1) if len(t) != groups else t for t in (dk, dv))
    return tuple(t.transpose(0, 1).contiguous() for t in (dq.mul_(scale), dk, dv))  # type: ignore[return-value]


def _heads_first(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values [H, N, …]; keys and values are repeated for each head of their group."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return (q * scale).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.linear_cross_entropy` -> (nll, argmax, and with `with_grad` the gradients of hidden, weight fp32).

    Gradients are computed while a chunk's logits exist, so no logits are kept or computed twice.
    """
    nll = torch.empty(len(hidden), dtype=torch.float32)
    argmax = torch.empty_like(targets)
    d_hidden = torch.empty_like(hidden if with_grad else hidden[:0])
    d_weight = torch.zeros_like(weight if with_grad else weight[:0], dtype=torch.float32)
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
        if not with_grad:
            continue
        share = valid.to(p.dtype) if row_weights is None else torch.where(valid, row_weights[rows], 0)
        p.mul_((share / sums)[:, None])
        p.scatter_add_(1, target, -share[:, None])
        d_logits = p.to(hidden.dtype)
        torch.mm(d_logits, weight, out=d_hidden[rows])
        d_weight += torch.mm(d_logits.T, hidden[rows])
    return nll, argmax, d_hidden, d_weight
