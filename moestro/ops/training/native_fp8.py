"""The steps of FP8 layers on the compiled kernels (`csrc/training/fp8.h`); `fused_fp8.py` says what each computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.fp8 import LEAST_NORMAL, Block, round_scales
from moestro.ops.precision import Format, Fp8Recipe
from moestro.ops.training.fused_fp8 import Blocks, count_tiles, segments
from moestro.ops.training.native import addresses, combine
from moestro.ops.training.reference_fp8 import LARGEST, LENGTH

__all__ = ["combine", "multiply", "multiply_back", "multiply_columns", "quantize", "quantize_weight", "widen"]


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
    """See `fused_fp8.quantize`."""
    whole = recipe.tile == "tensor"
    if whole and rows is not None:
        x, x_scales, rows = x[rows], None if x_scales is None else x_scales[rows], None
    x = x.contiguous()
    slots, width = len(x) if rows is None else len(rows), x.shape[1]
    given = _scales_of_tensors(x, x_scales, bounds, recipe, format) if whole else None
    values = x.new_empty(slots, width, dtype=torch.bfloat16)
    codes = x.new_empty(values.shape if keep else 0, dtype=torch.uint8)
    scales = x.new_ones(count_tiles(slots, block, bounds), -(-width // block[1]), dtype=torch.float32)
    starts = torch.tensor([0, slots]) if bounds is None else bounds
    flags = (int(block[0] > 1), int(block[1] > 1), int(format == "e5m6"))
    kind = library.TYPES[x.dtype] if x_scales is None else 0
    numbers = (len(starts) - 1, slots, len(x), width, *flags, int(recipe.scale == "ue8m0" or format == "e5m6"), kind)
    operands = (values, codes if keep else None, scales, x, x_scales, rows, starts, given)
    library.call("moestro_fp8_quantize", *operands, *numbers, torch.get_num_threads())
    return Blocks(values, scales, codes)


def _scales_of_tensors(
    x: Tensor, x_scales: Tensor | None, bounds: Tensor | None, recipe: Fp8Recipe, format: Format
) -> Tensor:
    """One scale for the rows of every expert [E]; experiments only, so in plain torch."""
    if x_scales is not None:
        x = widen(x).float() * x_scales.repeat_interleave(LENGTH, 1)[:, : x.shape[1]]
    largest = torch.zeros(1 if bounds is None else len(bounds) - 1)
    for expert, part in segments(bounds, len(x)):
        largest[expert] = x[part].abs().amax() if x.shape[1] else 0
    scales = largest / LARGEST[format]
    scales = torch.where(scales < LEAST_NORMAL, 1.0, scales)
    return round_scales(scales) if recipe.scale == "ue8m0" or format == "e5m6" else scales


def quantize_weight(weight: Tensor, recipe: Fp8Recipe) -> Blocks:
    """See `fused_fp8.quantize_weight`."""
    *stack, height, width = weight.shape
    count = stack[0] if stack else 1
    found = quantize(weight.reshape(-1, width), (LENGTH, LENGTH), recipe, bounds=torch.arange(count + 1) * height)
    tiles = -(-height // LENGTH)
    scales = found.scales[: count * tiles].view(*stack, tiles, -1)
    return Blocks(found.values.view(weight.shape), scales, found.codes)


def widen(codes: Tensor) -> Tensor:
    """See `fused_fp8.widen`."""
    values = codes.new_empty(codes.shape, dtype=torch.bfloat16)
    library.call("moestro_fp8_widen", values, codes, codes.numel(), torch.get_num_threads())
    return values


def multiply(
    a: Blocks, rows: Tensor | None, weights: Sequence[Blocks], bounds: Tensor | None, recipe: Fp8Recipe
) -> Tensor:
    """See `fused_fp8.multiply`."""
    return _multiply(a, rows, weights, bounds, back=False)


def multiply_back(
    a: Blocks, rows: Tensor | None, weights: Sequence[Blocks], bounds: Tensor | None, recipe: Fp8Recipe
) -> Tensor:
    """See `fused_fp8.multiply_back`."""
    return _multiply(a, rows, weights, bounds, back=True)


def _multiply(
    a: Blocks, rows: Tensor | None, weights: Sequence[Blocks], bounds: Tensor | None, *, back: bool
) -> Tensor:
    height, width = weights[0].values.shape[-2:]
    slots = len(a.values) if rows is None else len(rows)
    tables = (
        addresses([w.values for w in weights], (height, width)),
        addresses([w.scales for w in weights], (-(-height // LENGTH), -(-width // LENGTH))),
    )
    out = a.values.new_empty(slots, width if back else height)
    starts = torch.tensor([0, slots]) if bounds is None else bounds
    sizes = (len(tables[0]), slots, len(a.values), height, width, int(back), torch.get_num_threads())
    library.call("moestro_fp8_rows", out, a.values, a.scales, rows, *tables, starts, *sizes)
    return out


def multiply_columns(a: Blocks, b: Blocks, bounds: Tensor | None, recipe: Fp8Recipe) -> Tensor:
    """See `fused_fp8.multiply_columns`."""
    slots, m, k = len(a.values), a.values.shape[1], b.values.shape[1]
    starts = torch.tensor([0, slots]) if bounds is None else bounds
    out = a.values.new_empty(len(starts) - 1, m, k, dtype=torch.float32)
    sizes = (len(starts) - 1, slots, m, k, torch.get_num_threads())
    library.call("moestro_fp8_columns", out, a.values, a.scales, b.values, b.scales, starts, *sizes)
    return out


def swiglu(h: Tensor, weights: Tensor) -> Tensor:
    """See `fused_fp8.swiglu`."""
    out = h.new_empty(len(h), h.shape[1] // 2)
    library.call("moestro_fp8_swiglu", out, h, weights.contiguous(), *out.shape, torch.get_num_threads())
    return out


def swiglu_backward(d_act: Tensor, h: Blocks, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `fused_fp8.swiglu_backward`."""
    act, dh, d_weights = torch.empty_like(d_act), d_act.new_empty(h.codes.shape), torch.empty_like(weights)
    operands = (act, dh, d_weights, d_act, h.codes, h.scales, weights.contiguous())
    library.call("moestro_fp8_swiglu_backward", *operands, *d_act.shape, torch.get_num_threads())
    return act, dh, d_weights
