"""Attention of served rows over the pages of a cache that many sequences share.

A row of the result depends on its own inputs alone, bit for bit. The kernel is in csrc/serving/attention.h; if it
cannot run, `reference.py` computes the same within rounding.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops import library
from moestro.ops.serving import fp8_rows, reference


def paged_attention(
    q: Tensor,
    pages: Tensor,
    page_tables: Tensor,
    starts: Tensor,
    first: Tensor,
    *,
    groups: int,
    value_offset: int,
    value_width: int,
    scale: float,
    selection: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the rows of S sequences over their cached rows. q [N, H, K] -> [N, H, V] of its type.

    Sequence s owns query rows starts[s] … starts[s + 1] − 1 at positions first[s], first[s] + 1, …; a row at position
    p sees the cached rows 0 … p. Row i is at pages[page_tables[s, i // 64], i % 64]. In its W = groups · w values, the
    key of group g starts at g · w and its value at g · w + value_offset; head h uses group h · groups // H.

    pages [P, 64, W] of q's type, page_tables [S, max_pages] int32, starts [S + 1] and first [S] int64. Pages of uint8
    are an FP8 cache's (`fp8_rows.py`) of `value_width` codes a row: the result is bit for bit that over pages of its
    rows widened to q's type. With `selection` [N, M] int32 a row sees only these positions: ascending, at least one,
    none beyond its own, padded with −1.
    ValueError or RuntimeError if they are not. Selecting all positions gives the same bits as no selection.
    """
    rows, heads, width = q.shape
    if selection is not None:
        shape = list(selection.shape)
        if selection.dtype != torch.int32 or len(shape) != 2 or shape[0] != rows or not shape[1]:
            raise ValueError(f"paged_attention: a selection of {selection.dtype} {shape} for {rows} rows")
    if not library.serves(q):
        if selection is not None:
            pages, page_tables, starts, first = _gather(pages, page_tables, starts, first, selection)
        numbers = (groups, value_offset, value_width, scale)
        return _attend(q, pages, page_tables, starts, first, numbers)
    if (
        pages.dtype not in (q.dtype, torch.uint8)
        or page_tables.dtype != torch.int32
        or {starts.dtype, first.dtype} != {torch.int64}
    ):
        raise ValueError(
            "paged_attention: pages must have the type of q or uint8, tables int32, starts and first int64"
        )
    q, page_tables, starts, first = q.contiguous(), page_tables.contiguous(), starts.contiguous(), first.contiguous()
    if not pages.is_contiguous() or len(starts) != len(first) + 1 or len(page_tables) != len(first):
        raise ValueError("paged_attention: pages must be contiguous, with one table, start and first for each sequence")
    out = q.new_empty(rows, heads, value_width)
    sizes = (rows, len(pages), *page_tables.shape, heads, width, value_width, pages.shape[2], groups, value_offset)
    chosen = (None, 0) if selection is None else (selection.contiguous(), selection.shape[1])
    kinds = (scale, library.CACHE_TYPES[pages.dtype], library.TYPES[q.dtype], torch.get_num_threads())
    library.call("moestro_paged_attention", out, q, pages, page_tables, starts, first, *sizes, *chosen, *kinds)
    return out


def _attend(
    q: Tensor, pages: Tensor, tables: Tensor, starts: Tensor, first: Tensor, numbers: tuple[int, int, int, float]
) -> Tensor:
    groups, value_offset, value_width, scale = numbers
    heads = q.shape[1] // groups
    out = q.new_empty(len(q), q.shape[1], value_width)
    bounds = starts.tolist()
    for s, (begin, end) in enumerate(pairwise(bounds)):
        seen = first[s] + 1 + torch.arange(end - begin).repeat_interleave(heads)
        used = -(-int(seen[-1]) // reference.PAGE) if end > begin else 0
        rows = pages[tables[s, :used].long()].flatten(0, 1)
        if rows.dtype == torch.uint8:
            rows = fp8_rows.unpack_rows(rows, value_width, q.shape[2], q.dtype)
        rows = rows.unflatten(-1, (groups, -1))
        for g in range(groups):
            own = slice(g * heads, (g + 1) * heads)
            mixed = reference.attend(
                q[begin:end, own].flatten(0, 1), rows[:, g], seen, scale, value_offset, value_width
            )
            out[begin:end, own] = mixed.unflatten(0, (-1, heads)).to(q.dtype)
    return out


def _gather(
    pages: Tensor, tables: Tensor, starts: Tensor, first: Tensor, selection: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages, tables, starts and first that make each row its own sequence, which has cached the selected rows."""
    (number, most), page = selection.shape, reference.PAGE
    row, count = torch.arange(number), (selection >= 0).sum(1)
    sequence = torch.bucketize(row, starts[1:], right=True)
    used = torch.arange(most) < count[:, None]
    filled_up = torch.where(used, selection >= 0, selection == -1).all()
    ascends = (selection.diff(dim=1) > 0)[used[:, 1:]].all()
    seen = first[sequence] + row - starts[sequence] + 1
    if not (filled_up and ascends and (count > 0).all() and (selection < seen[:, None]).all()):
        raise ValueError("paged_attention: selected positions must ascend to at most the row's own, then be -1")
    positions = F.pad(selection.clamp(min=0).long(), (0, -most % page))
    slots = tables[sequence].gather(1, positions // page).long() * page + positions % page
    gathered = pages.flatten(0, 1)[slots].view(-1, page, pages.shape[2])
    own = torch.arange(len(gathered), dtype=torch.int32).view(number, positions.shape[1] // page)
    return gathered, own, torch.arange(number + 1), count - 1
