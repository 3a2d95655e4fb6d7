"""The serving operations in plain torch: rows that depend on themselves alone, bit for bit, without compiled kernels.

In a library, the order of sums in a matrix product depends on the number of rows, and in a reduction on the shape;
activations compute the end of a tensor with different code than the rest. So a token's numbers would depend on what
else is in the batch. Here they do not:

    products      fp32 products of tiles of one constant shape, the last padded with zeros, added in the order of k
    sums of rows  halves added until one value is left
    exp and such  in pieces that torch gives to one thread, padded to whole vectors
    the rest      single operations that IEEE 754 rounds in one way

Signatures and meanings are those of `weights.py`, `rows.py` and `attention.py`, which document them. This is slower
than a library's products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops.fp8 import LEAST_ACTIVATION, dequantize_fp8, quantize_fp8
from moestro.ops.serving import formats
from moestro.ops.serving.formats import PANEL
from moestro.routing.selection import Selection, add_bias, choose, score_experts, weigh

TILE_ROWS, TILE = 16, 64
PANELS_AT_ONCE = 64  # panels unpacked at a time
PIECE = 16384  # elements; torch shares work among threads above 32768
VECTOR = 64  # elements: a multiple of two vectors of any type and instruction set
PAGE = 64
COLUMNS = 64  # queries and heads that attend together

Elementwise = Callable[[Tensor], Tensor]


def activate(function: Elementwise, x: Tensor) -> Tensor:
    """Apply an elementwise function to x of any shape."""
    flat = F.pad(x.flatten(), (0, -x.numel() % VECTOR))
    return torch.cat([function(piece) for piece in flat.split(PIECE)])[: x.numel()].view(x.shape)


def sum_rows(x: Tensor) -> Tensor:
    """Sums over the last axis, kept with length 1."""
    x = F.pad(x, (0, (1 << max(0, x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def multiply(x: Tensor, tiles: Tensor) -> Tensor:
    """x [N, K] fp32 times tiles [K / 64, T, 64, 64] of T column blocks -> [N, T · 64]; N is padded, K must fit."""
    n = len(x)
    rows = F.pad(x, (0, 0, 0, -n % TILE_ROWS)).unflatten(0, (-1, TILE_ROWS)).unflatten(2, (-1, TILE))
    out = x.new_zeros(len(rows), tiles.shape[1], TILE_ROWS, TILE)
    for total, row in zip(out, rows, strict=True):
        for left, right in zip(row.unbind(1), tiles, strict=True):
            total += torch.bmm(left.expand(len(right), -1, -1), right)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)[:n]


def linear(x: Tensor, panels: Tensor, format: str, *, round_rows: bool = False) -> Tensor:
    """x [N, K], packed panels -> [N, panels · 64] fp32; `round_rows`: rows are rounded to fp8 in tiles of 128."""
    length = formats.FORMATS[format].length
    rows = F.pad(x.float(), (0, -x.shape[1] % length))
    if formats.FORMATS[format].quantises_rows:
        rows = formats.round_rows(rows, format)
    elif round_rows:
        rows = dequantize_fp8(*quantize_fp8(rows, least=LEAST_ACTIVATION))
    rows = F.pad(rows, (0, -rows.shape[1] % TILE))
    parts = []
    for some in panels.split(PANELS_AT_ONCE):
        values = formats.unpack_panels(some, format)  # [p, K, 64]
        values = F.pad(values, (0, 0, 0, rows.shape[1] - values.shape[1])).unflatten(1, (-1, TILE))
        parts.append(multiply(rows, values.transpose(0, 1)))
    return torch.cat(parts, 1) if parts else rows.new_empty(len(x), 0)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    format: str,
    *,
    round_rows: bool = False,
) -> Tensor:
    """x [N, D] through packed experts, gate_up and down E times [panels, bytes] -> [N, at least D] fp32."""
    slots = torch.zeros(*ids.shape, -(-x.shape[1] // PANEL) * PANEL)  # [N, A, D]
    for expert in ids[ids < len(down)].unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        halves = linear(x[token], gate_up[expert], format, round_rows=round_rows).unflatten(1, (-1, 2, PANEL // 2))
        gate, up = halves.unbind(2)
        act = (activate(F.silu, gate) * up).flatten(1)
        if format in ("bf16", "fp8") and x.dtype == torch.bfloat16 and not round_rows:
            act = act.bfloat16()
        slots[token, choice] = linear(_cut(act, down[expert], format), down[expert], format, round_rows=round_rows)
    out = torch.zeros(len(x), slots.shape[2])
    for choice in range(ids.shape[1]):
        out = out + slots[:, choice] * weights[:, choice, None].float()
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rows.rms_norm`."""
    wide = x.float()
    mean = sum_rows(wide * wide) / x.shape[-1]
    return (wide * (1 / (mean + eps).sqrt()) * weight.float()).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `rows.swiglu`."""
    gate, up = gate_up.float().chunk(2, -1)
    return (activate(F.silu, gate) * up).to(gate_up.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rows.rope`."""
    shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1] // 2)
    cos, sin, (even, odd) = cos.view(shape), sin.view(shape), x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class FixedOrder:
    """The arithmetic of `routing/selection.py` with sums in a fixed order."""

    def apply(self, function: Elementwise, x: Tensor) -> Tensor:
        return activate(function, x)

    def softmax(self, x: Tensor) -> Tensor:
        weights = activate(torch.exp, x - x.amax(-1, keepdim=True))
        return weights / sum_rows(weights)

    def sum(self, x: Tensor) -> Tensor:
        return sum_rows(x)


FIXED_ORDER = FixedOrder()


def route(logits: Tensor, selection: Selection, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `rows.route`."""
    scores = score_experts(logits, selection.score, FIXED_ORDER)
    chosen = choose(add_bias(scores, selection), selection)
    ids = chosen if ids is None else torch.where(ids < 0, chosen, ids)
    return ids, weigh(scores, ids, selection, FIXED_ORDER)


def attend(q: Tensor, rows: Tensor, seen: Tensor, scale: float, value_offset: int, value_width: int) -> Tensor:
    """q [C, K] over rows [L, w] in whole pages; column c sees the first seen[c] rows -> [C, V] fp32.

    Online softmax over pages, COLUMNS at a time: every product and every activation has one constant shape.
    """
    fill, parts = -len(q) % COLUMNS, []
    columns = F.pad(q.float(), (0, -q.shape[1] % TILE, 0, fill)).split(COLUMNS)
    for some, limit in zip(columns, F.pad(seen, (0, fill)).split(COLUMNS), strict=True):
        largest, total = torch.full((COLUMNS, 1), -torch.inf), torch.zeros(COLUMNS, 1)
        out = torch.zeros(COLUMNS, value_width)
        for first in range(0, int(limit.max()), PAGE):
            place = first + torch.arange(PAGE)
            page = torch.where((place < limit.max())[:, None], rows[first : first + PAGE].float(), 0)
            keys = F.pad(page[:, : q.shape[1]], (0, some.shape[1] - q.shape[1]))
            scores = torch.where(place < limit[:, None], _product(some, keys.T) * scale, -torch.inf)
            now = torch.maximum(largest, scores.amax(-1, keepdim=True))
            safe = torch.where(now > -torch.inf, now, 0)
            weights, before = torch.exp(scores - safe), torch.exp(largest - safe)
            total = total * before + sum_rows(weights)
            values = page[:, value_offset : value_offset + value_width]
            out, largest = out * before + _product(weights, values), now
        parts.append(out / total)
    return torch.cat(parts)[: len(q)] if parts else q.new_empty(0, value_width, dtype=torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [COLUMNS, K] times b [K, n], fp32, K in whole tiles -> [COLUMNS, n]."""
    by_tile = torch.bmm(a.unflatten(1, (-1, TILE)).transpose(0, 1), b.unflatten(0, (-1, TILE)))
    total = by_tile[0]
    for one in by_tile[1:]:
        total = total + one
    return total


def _cut(act: Tensor, down: Tensor, format: str) -> Tensor:
    """The columns of act [N, panels · 32] that `down` takes; the zeros beyond them would meet zeros."""
    spec = formats.FORMATS[format]
    return act[:, : down.shape[1] // spec.nbytes * spec.length]
