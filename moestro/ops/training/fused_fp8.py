"""The steps of FP8 layers in plain torch, for all experts at once; `native_fp8.py` has the same on kernels.

`fp8.py` puts them together. Rows of an operand may be chosen by index, and tiles along tokens begin anew at every bound
(an expert's first row). Rows from the last bound on belong to no expert: nobody reads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.ops.fp8 import E4M3, Block
from moestro.ops.precision import Format, Fp8Recipe
from moestro.ops.training import devices, reference_fp8
from moestro.ops.training.reference_fp8 import COLUMN, LENGTH


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix [R, K], or a stack of them: `values` of its codes in bf16, their `scales`, and `codes`.

    `values` are what products read, `codes` (E4M3, one byte each) what is kept; either may be empty. Scales are fp32,
    [tiles along rows, tiles along columns].
    """

    values: Tensor
    scales: Tensor
    codes: Tensor


def quantize(
    x: Tensor,
    block: Block,
    recipe: Fp8Recipe,
    *,
    format: Format = "e4m3",
    bounds: Tensor | None = None,
    rows: Tensor | None = None,
    x_scales: Tensor | None = None,
    keep: bool = False,
) -> Blocks:
    """Rows x[rows] [S, K] in blocks that begin anew at every bound.

    x is bf16 or fp32, or E4M3 bytes in tiles of 1 x 128 with `x_scales`. `keep` asks for the codes, too. There are
    `count_tiles` rows of scales.
    """
    if rows is not None:
        x, x_scales = x[rows], None if x_scales is None else x_scales[rows]
    if x_scales is not None:
        x = reference_fp8.read_back(widen(x), x_scales)
    values = torch.zeros_like(x, dtype=torch.bfloat16)
    scales = x.new_ones(count_tiles(len(x), block, bounds), -(-x.shape[1] // block[1]), dtype=torch.float32)
    first = 0
    for _, part in segments(bounds, len(x)):
        values[part], found = reference_fp8.quantize(x[part], block, recipe, format)
        place = part.start if block[0] == 1 else first
        scales[place : place + len(found)] = found
        first += len(found)
    return Blocks(values, scales, values.to(E4M3).view(torch.uint8) if keep else x.new_empty(0, dtype=torch.uint8))


def quantize_weight(weight: Tensor, recipe: Fp8Recipe) -> Blocks:
    """A matrix [M, K], or a stack [E, M, K], in blocks of 128 x 128 of their own -> values in its shape, scales."""
    found = [reference_fp8.quantize(m, (LENGTH, LENGTH), recipe) for m in weight.reshape(-1, *weight.shape[-2:])]
    values, scales = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Blocks(values.view(weight.shape), scales.view(*weight.shape[:-2], *scales.shape[1:]), values.new_empty(0))


def widen(codes: Tensor) -> Tensor:
    """The values of E4M3 bytes in bf16."""
    return codes.view(E4M3).to(torch.bfloat16)


def multiply(
    a: Blocks, rows: Tensor | None, weights: Sequence[Blocks], bounds: Tensor | None, recipe: Fp8Recipe
) -> Tensor:
    """Rows a[rows] [S, K] of each expert times its matrix [M, K], transposed -> [S, M] bf16. Tiles of a: 1 x 128."""
    matrices = one_each(weights)
    values, scales = (a.values, a.scales) if rows is None else (a.values[rows], a.scales[rows])
    out = values.new_zeros(len(values), len(matrices[0][0]))
    for e, part in segments(bounds, len(values)):
        matrix, of_blocks = matrices[e]
        of_rows = of_blocks.repeat_interleave(LENGTH, 0)[: len(matrix)]
        out[part] = product(values[part], scales[part], matrix, of_rows, recipe).to(out.dtype)
    return out


def multiply_back(
    a: Blocks, rows: Tensor | None, weights: Sequence[Blocks], bounds: Tensor | None, recipe: Fp8Recipe
) -> Tensor:
    """Rows a[rows] [S, M] of each expert times its matrix [M, K] -> [S, K] bf16."""
    turned = [Blocks(w.values.mT, w.scales.mT, w.codes) for w in weights]
    return multiply(a, rows, turned, bounds, recipe)


def multiply_columns(a: Blocks, b: Blocks, bounds: Tensor | None, recipe: Fp8Recipe) -> Tensor:
    """For each expert aᵀ b over its rows: a [S, M], b [S, K], in tiles of 128 x 1 -> [E, M, K] fp32."""
    experts = 1 if bounds is None else len(bounds) - 1
    out = a.values.new_zeros(experts, a.values.shape[1], b.values.shape[1], dtype=torch.float32)
    first = 0
    for e, part in segments(bounds, len(a.values)):
        tiles = slice(first, first + count_tiles(part.stop - part.start, COLUMN, None))
        first = tiles.stop
        left, right = ((t.values[part].T, t.scales[tiles].T) for t in (a, b))
        out[e] = product(*left, *right, recipe)
    return out


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, recipe: Fp8Recipe) -> Tensor:
    """`reference_fp8.product`, by tensor cores where they take it."""
    if devices.multiplies_fp8(a, b, recipe):
        return devices.fp8_product(a, a_scales, b, b_scales)
    return reference_fp8.product(a, a_scales, b, b_scales, recipe)


def swiglu(h: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) · up · weight, rounded once: h [S, 2F] bf16, weights [S] fp32 -> [S, F] bf16."""
    return reference_fp8.swiglu(h, weights).to(h.dtype)


def swiglu_backward(d_act: Tensor, h: Blocks, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From h [S, 2F] in codes: the activation again [S, F], gradients of h [S, 2F], both bf16, and of weights [S]."""
    wide = reference_fp8.read_back(widen(h.codes), h.scales)
    act, dh, d_weights = reference_fp8.swiglu_gradients(d_act, wide, weights)
    return act.to(d_act.dtype), dh.to(d_act.dtype), d_weights


def combine(y: Tensor, inverse: Tensor, bounds: Tensor, top_k: int) -> Tensor:
    """Sum the slots of every token, in fp32, rounded once: y [N · A, D], inverse [N · A] -> [N, D]."""
    y[int(bounds[-1]) :] = 0
    return y[inverse].unflatten(0, (-1, top_k)).float().sum(1).to(y.dtype)


def segments(bounds: Tensor | None, rows: int) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has some."""
    edges = [0, rows] if bounds is None else bounds.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(edges)):
        if end > start:
            yield expert, slice(start, end)


def count_tiles(rows: int, block: Block, bounds: Tensor | None) -> int:
    """Tiles along rows, at most: the true number, for segments of unknown length, depends on data."""
    whole = -(-rows // block[0])
    return whole if bounds is None or block[0] == 1 else rows // block[0] + len(bounds) - 1


def one_each(weights: Sequence[Blocks]) -> list[tuple[Tensor, Tensor]]:
    """(values, scales) of every expert's matrix, given one by one or as one stack."""
    if weights[0].values.dim() == 2:
        return [(w.values, w.scales) for w in weights]
    (stack,) = weights
    return list(zip(stack.values, stack.scales, strict=True))
