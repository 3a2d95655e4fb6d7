"""A serving step with the products of torch's library, for machines without the kernels: ARM, Macs, no compiler.

`reference.py` gives each row the same bits in any company, at the price of products in small tiles. Here products,
sums and attention are the library's own, on whole matrices: an order of magnitude faster, and as fast as the trained
pass. The order of sums then depends on how many rows there are, so a request's tokens and log-probabilities may differ
in the last bits with what shares its batch, with how its prompt is cut, and with prefixes found in the cache. Quantised
weights are multiplied as the numbers that they mean, and rows stay as they are unless they are rounded to fp8 on
purpose. `MOESTRO_OPS=reference` has the promise instead.

Weights are opened once, that is, kept as matrices instead of panels, if memory allows; else a product opens what it
needs each time. Small models, and all where the CPU has no bf16 instructions, are multiplied in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro import machine
from moestro.ops import library
from moestro.ops.fp8 import LEAST_ACTIVATION, dequantize_fp8, quantize_fp8
from moestro.ops.serving import fp8_rows
from moestro.ops.serving.program import Caches, Eager, Heads, StepLayout
from moestro.ops.serving.reference import PAGE
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear
from moestro.ops.training.fused import sort_by_expert
from moestro.routing.selection import Selection, add_bias, choose, score_experts, weigh

OPENED_SHARE = 0.8  # of the free memory may go to opened weights
SMALL = 10**9  # bytes of weights in fp32 that are read quickly enough; products in bf16 cost more time per call
SCORES_ROWS = 2048  # rows of attention scores, queries times heads, that exist at a time
Packed = PackedLinear | PackedHeads | PackedExperts


def computes() -> bool:
    """Whether models are served this way: the kernels cannot run, and the reference is not asked for."""
    return not library.is_available() and library.WISH != "reference"


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that products of rows of `dtype` are computed in."""
    fast = dtype == torch.float32 or machine.describe_machine().bf16_is_fast
    return dtype if fast else torch.float32


def open_parts(parts: Iterable[object], dtype: torch.dtype) -> bool:
    """Open the packed weights among `parts`, for rows of `dtype`, if memory allows; whether it did."""
    packed = [part for part in parts if isinstance(part, Packed)]
    needed = {kind: sum(part.bytes_to_open(kind) for part in packed) for kind in (torch.float32, dtype)}
    room = int(machine.usable_bytes() * OPENED_SHARE)
    wished = (torch.float32,) if needed[torch.float32] <= min(SMALL, room) else (product_dtype(dtype), dtype)
    kind = next((kind for kind in wished if needed[kind] <= room), None)
    if kind is None:
        return False
    for part in packed:
        part.open(kind)
    return True


def linear(weight: PackedLinear, x: Tensor) -> Tensor:
    """x [N, K] -> x Wᵀ [N, M] of its type."""
    matrix = _numbers(weight, x.dtype)
    return F.linear(_rows(weight, x).to(matrix.dtype), matrix).to(x.dtype)


def _numbers(weight: PackedLinear | PackedHeads, dtype: torch.dtype) -> Tensor:
    """The matrices of a weight, in the type in which they meet rows of `dtype`."""
    if weight.values is not None and weight.values.dtype == dtype:
        return weight.values
    kind = product_dtype(dtype)
    values = weight.unpack(kind) if weight.values is None else weight.values
    return values.to(torch.promote_types(kind, values.dtype))


def _rows(weight: PackedLinear | PackedExperts, x: Tensor) -> Tensor:
    """x as it meets a weight: rounded to fp8 in tiles of 128 if it asks for that."""
    return dequantize_fp8(*quantize_fp8(x.float(), least=LEAST_ACTIVATION)) if weight.rounds_rows else x


class Plain(Eager):
    """Runs operations at once, with the library's products. `ids`: see `Eager`."""

    def __init__(self, layout: StepLayout, layers: Sequence[Caches], ids: Tensor) -> None:
        super().__init__(layout, layers, ids)
        self._turns = torch.complex(layout.cos, layout.sin)

    def linear(self, weight: PackedLinear, x: Tensor) -> Tensor:
        return linear(weight, x.flatten(1))[:, None]

    def heads(self, weight: PackedHeads, x: Tensor) -> Tensor:
        matrices = _numbers(weight, x.dtype)
        return torch.bmm(x.transpose(0, 1).to(matrices.dtype), matrices.mT).transpose(0, 1).to(x.dtype)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

    def swiglu(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, -1)
        return (F.silu(gate) * up).to(x.dtype)

    def rope(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._turns[:, None]).flatten(-2).to(x.dtype)

    def attend(self, layer: int, name: str, q: Tensor, heads: Heads, selection: Tensor | None = None) -> Tensor:
        if selection is not None:
            return super().attend(layer, name, q, heads, selection)
        pages, tables = self.layers[layer][name], self.layout.tables

        def rows_of(table: Tensor) -> Tensor:
            """The rows [S, L, W] of a table [S, pages]."""
            rows = pages[table].flatten(0, 2)
            if rows.dtype == torch.uint8:
                rows = fp8_rows.unpack_rows(rows, heads.value_width, q.shape[2], q.dtype)
            return rows.float().unflatten(0, (len(table), -1))

        if len(q) == len(tables):
            return attend_once(q, rows_of(tables), self.layout.first + 1, heads)
        out = q.new_empty(*q.shape[:2], heads.value_width)
        for s, (begin, end) in enumerate(pairwise(self.layout.starts.tolist())):
            seen = int(self.layout.first[s]) + end - begin
            (rows,) = rows_of(tables[s : s + 1, : -(-seen // PAGE)])
            out[begin:end] = attend(q[begin:end], rows[:seen], heads)
        return out

    def route(self, index: int, logits: Tensor | None, selection: Selection) -> Tensor:
        if logits is None:
            logits = torch.zeros(self.ids.shape[1], len(selection.bias))
        scores, known = score_experts(logits.flatten(1), selection.score), self.ids[index]
        compared = add_bias(scores, selection).double()  # a few values are sorted faster than packed into keys
        torch.where(known < 0, choose(compared, selection), known, out=known)
        self.weights.append(weigh(scores, known, selection))
        return self.weights[-1]

    def experts(self, index: int, weight: PackedExperts, x: Tensor, weights: Tensor) -> Tensor:
        return experts(weight, x.flatten(1), self.ids[index], weights)[:, None]


def attend_once(q: Tensor, rows: Tensor, seen: Tensor, heads: Heads) -> Tensor:
    """One position of each of S sequences, q [S, H, K], over the first seen [S] of its rows [S, L, W] -> [S, H, V].

    `rows` are the caller's to give: unseen ones, which may never have been written, become zeros.
    """
    unseen = torch.arange(rows.shape[1]) >= seen[:, None]
    rows.masked_fill_(unseen[..., None], 0.0)
    keys, values = _split(rows, q.shape[2], heads)  # [S, G, L, ..]
    queries = (q.float() * heads.scale).unflatten(1, (heads.groups, -1))
    scores = queries @ keys.mT
    return (scores.masked_fill_(unseen[:, None, None], -torch.inf).softmax(-1) @ values).flatten(1, 2).to(q.dtype)


def attend(q: Tensor, rows: Tensor, heads: Heads) -> Tensor:
    """The last n positions of a sequence, q [n, H, K], over all its rows [L, W] -> [n, H, V]."""
    keys, values = _split(rows, q.shape[2], heads)  # [G, L, ..]
    queries = (q.float() * heads.scale).unflatten(1, (heads.groups, -1)).transpose(0, 1)  # [G, n, H / G, K]
    parts, seen = [], len(rows) - len(q)
    for block in queries.split(max(1, SCORES_ROWS // q.shape[1]), 1):
        m = block.shape[1]
        seen += m
        scores = torch.bmm(block.flatten(1, 2), keys[:, :seen].mT).unflatten(1, (m, -1))
        scores[..., -m:] += torch.full((m, m), -torch.inf).triu_(1)[:, None]  # rows that come later
        mixed = torch.bmm(scores.flatten(1, 2).softmax(-1), values[:, :seen])
        parts.append(mixed.unflatten(1, (m, -1)).transpose(0, 1).flatten(1, 2))
    return torch.cat(parts).to(q.dtype) if parts else q.new_empty(0, q.shape[1], heads.value_width)


def _split(rows: Tensor, width: int, heads: Heads) -> tuple[Tensor, Tensor]:
    """Rows [..., L, W] fp32 -> keys [..., G, L, width] and values [..., G, L, V]."""
    by_group = rows.unflatten(-1, (heads.groups, -1)).transpose(-2, -3)
    return by_group[..., :width], by_group[..., heads.value_offset : heads.value_offset + heads.value_width]


def experts(weight: PackedExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x [N, D] through the experts ids [N, A] -> [N, D] of its type; see `PackedExperts.__call__`."""
    kind, (n, top_k) = product_dtype(x.dtype), ids.shape
    if weight.values is not None:
        kind = torch.promote_types(kind, weight.values[0].dtype)
    order, inverse, bounds = sort_by_expert(ids, weight.num_experts)
    if not int(bounds[-1]):
        return torch.zeros_like(x)  # every choice was dropped
    counts = {expert: count for expert, count in enumerate(bounds.diff().tolist()) if count}
    gate_ups, downs = zip(*(weight.expert(expert, kind) for expert in counts), strict=True)
    carried = order[: sum(counts.values())]  # of the choices, in the order of experts
    rows = _rows(weight, x).to(kind).index_select(0, carried // top_k)
    gate, up = _multiply(rows, gate_ups, list(counts.values())).chunk(2, -1)
    acts = _rows(weight, F.silu(gate) * up) * weights.flatten()[carried, None]
    out = _multiply(acts.to(kind), downs, list(counts.values()))
    out = F.pad(out, (0, 0, 0, n * top_k - len(carried)))
    return out.index_select(0, inverse).view(n, top_k, -1).sum(1).to(x.dtype)


def _multiply(rows: Tensor, matrices: Sequence[Tensor], counts: list[int]) -> Tensor:
    """counts[0] rows of [n, K] times matrices[0] [M, K], then counts[1] rows times matrices[1], … -> [n, M]."""
    parts = zip(rows.split(counts), matrices, strict=True)
    return torch.cat([F.linear(some, matrix.to(some.dtype)) for some, matrix in parts])
