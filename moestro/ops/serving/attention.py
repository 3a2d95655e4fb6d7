"""Attention of served rows over the pages of a cache, in which the rows of many sequences lie.

A row of the result depends on its own inputs alone, bit for bit. The kernel is in csrc/serving/attention.h; where it
cannot run, `reference.py` computes the same within rounding.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.serving import reference


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
) -> Tensor:
    """Softmax attention of the rows of S sequences over their cached rows. q [N, H, K] -> [N, H, V] of its type.

    Sequence s owns query rows starts[s] … starts[s + 1] − 1 at positions first[s], first[s] + 1, …; a row at position
    p sees the cached rows 0 … p. Row i lies at pages[page_tables[s, i // 64], i % 64]. Of its W = groups · w values,
    the key of group g starts at g · w and its value at g · w + value_offset; head h uses group h · groups // H.

    pages [P, 64, W] of q's type, page_tables [S, max_pages] int32, starts [S + 1] and first [S] int64.
    """
    rows, heads, width = q.shape
    if not library.serves(q):
        numbers = (groups, value_offset, value_width, scale)
        return _attend(q, pages, page_tables, starts, first, numbers)
    if pages.dtype != q.dtype or page_tables.dtype != torch.int32 or {starts.dtype, first.dtype} != {torch.int64}:
        raise ValueError("paged_attention: pages must have the type of q, tables int32, starts and first int64")
    q, page_tables, starts, first = q.contiguous(), page_tables.contiguous(), starts.contiguous(), first.contiguous()
    if not pages.is_contiguous() or len(starts) != len(first) + 1 or len(page_tables) != len(first):
        raise ValueError("paged_attention: pages must be contiguous, with one table, start and first for each sequence")
    out = q.new_empty(rows, heads, value_width)
    sizes = (rows, len(pages), *page_tables.shape, heads, width, value_width, pages.shape[2], groups, value_offset)
    kinds = (scale, library.TYPES[q.dtype], torch.get_num_threads())
    library.call("moestro_paged_attention", out, q, pages, page_tables, starts, first, *sizes, *kinds)
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
        rows = pages[tables[s, :used].long()].flatten(0, 1).unflatten(-1, (groups, -1))
        for g in range(groups):
            own = slice(g * heads, (g + 1) * heads)
            mixed = reference.attend(
                q[begin:end, own].flatten(0, 1), rows[:, g], seen, scale, value_offset, value_width
            )
            out[begin:end, own] = mixed.unflatten(0, (-1, heads)).to(q.dtype)
    return out
