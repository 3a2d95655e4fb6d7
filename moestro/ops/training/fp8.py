"""Layers in FP8 as PyTorch operators: linear layers, and experts or a feed-forward layer with SwiGLU.

`reference_fp8.py` says what they compute. Here the steps of `native_fp8.py` (kernels) or `fused_fp8.py` (plain torch,
on any device) are put together, and what the backward pass reads is kept in FP8: inputs as codes and scales, in one
direction or both, and the inputs of SwiGLU. Inputs in E5M6 are kept as bf16 values, which hold them exactly. Quantised
weights are made once per change of the parameter (`forms.py`) and serve both passes and every micro-batch.

Operators take a recipe as text (`Fp8Recipe.key`) and the form to compute in, as in `operators.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.fp8 import SQUARE, TILE
from moestro.ops.precision import Fp8Recipe, read_recipe
from moestro.ops.training import forms, fused_fp8, native_fp8
from moestro.ops.training.fused import sort_by_expert
from moestro.ops.training.fused_fp8 import Blocks
from moestro.ops.training.operators import LIBRARY, define
from moestro.ops.training.reference_fp8 import COLUMN, LENGTH


def choose_form(form: str, recipe: Fp8Recipe, x: Tensor) -> Any:
    """The module with the steps of this call: the kernels, if they run, take x and add up as the recipe says."""
    if form == "torch" or recipe.accumulate != "fp32":
        return fused_fp8
    return native_fp8 if form == "native" or library.serves(x) else fused_fp8


def quantized_weights(by: Any, matrices: Sequence[Tensor], recipe: Fp8Recipe) -> list[Blocks]:
    """The parameters' quantised forms, each made once per change."""
    kind = ("fp8", by.__name__, recipe.scale, recipe.tile)
    return [forms.keep(matrix, kind, lambda values: by.quantize_weight(values, recipe)) for matrix in matrices]


# What is kept of inputs x [N, K]: their codes and scales, then those along tokens, empty where those are made later.


def keep_inputs(
    by: Any, x: Tensor, recipe: Fp8Recipe, bounds: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Blocks, list[Tensor]]:
    """x [N, K] -> its blocks for the product, and four tensors to keep for `inputs_along_tokens`."""
    wide, both = recipe.inputs == "e5m6", recipe.transpose == "both"
    own = bounds if rows is None else None  # x has the rows of all experts, in order
    blocks = by.quantize(x, TILE, recipe, format=recipe.inputs, bounds=own, keep=not wide and not both)
    if both:
        turned = by.quantize(x, COLUMN, recipe, format=recipe.inputs, bounds=bounds, rows=rows, keep=not wide)
        return blocks, [x.new_empty(0), x.new_empty(0), turned.values if wide else turned.codes, turned.scales]
    return blocks, [blocks.values if wide else blocks.codes, blocks.scales, x.new_empty(0), x.new_empty(0)]


def fake_inputs(x: Tensor, rows: int, experts: int, recipe: Fp8Recipe) -> list[Tensor]:
    """The shapes of `keep_inputs`; `rows` are those chosen for `experts`."""
    width = x.shape[1]
    dtype = torch.bfloat16 if recipe.inputs == "e5m6" else torch.uint8
    if recipe.transpose == "both":
        tiles = rows // LENGTH + experts if experts else -(-rows // LENGTH)
        turned = x.new_empty(tiles, width, dtype=torch.float32)
        return [x.new_empty(0), x.new_empty(0), x.new_empty(rows, width, dtype=dtype), turned]
    count = rows if recipe.tile == "tensor" else len(x)
    scales = x.new_empty(count, -(-width // LENGTH), dtype=torch.float32)
    return [x.new_empty(count, width, dtype=dtype), scales, x.new_empty(0), x.new_empty(0)]


def inputs_along_tokens(
    by: Any, kept: Sequence[Tensor], recipe: Fp8Recipe, bounds: Tensor | None = None, rows: Tensor | None = None
) -> Blocks:
    """The kept inputs in tiles of 128 x 1, chosen by `rows`."""
    codes, scales, turned, turned_scales = kept
    if recipe.transpose == "both":
        values = turned if turned.dtype == torch.bfloat16 else by.widen(turned)
        return Blocks(values, turned_scales, turned)
    where = {"bounds": bounds, "rows": rows}
    if codes.dtype == torch.bfloat16:  # E5M6: scale them back, exactly
        values = codes * scales.to(codes.dtype).repeat_interleave(LENGTH, 1)[:, : codes.shape[1]]
        return by.quantize(values, COLUMN, recipe, format=recipe.inputs, **where)
    return by.quantize(codes, COLUMN, recipe, x_scales=scales, **where)


def quantize_gradient(
    by: Any, dy: Tensor, recipe: Fp8Recipe, bounds: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Blocks, Tensor | None, Blocks]:
    """dy [N, M] -> blocks for the gradient of inputs, the rows to choose of them, blocks along tokens for weights'."""
    if recipe.dgrad_tile == "row":
        own = bounds if rows is None else None
        turned = by.quantize(dy, COLUMN, recipe, bounds=bounds, rows=rows)
        return by.quantize(dy, TILE, recipe, bounds=own), rows, turned
    square = by.quantize(dy, SQUARE, recipe, bounds=bounds, rows=rows)
    count = len(square.values)
    starts = torch.arange(count, device=dy.device)
    if bounds is None:
        tile = starts // LENGTH
    else:
        expert = torch.searchsorted(bounds, starts, right=True).clamp(max=len(bounds) - 1) - 1
        tiles = (bounds.diff() + LENGTH - 1) // LENGTH
        tile = (tiles.cumsum(0) - tiles)[expert] + (starts - bounds[expert]) // LENGTH
    by_row = square.scales[tile.clamp(max=max(len(square.scales) - 1, 0))]
    by_column = square.scales.repeat_interleave(LENGTH, 1)[:, : dy.shape[1]].contiguous()
    return Blocks(square.values, by_row, square.codes), None, Blocks(square.values, by_column, square.codes)


def gather_early(x: Tensor, token: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor | None]:
    """x [N, D] and the rows to choose of it [S]. With a scale per tensor, an expert's rows are one: chosen now."""
    return (x[token], None) if recipe.tile == "tensor" else (x, token)


# Linear layers: x [N, K] times the transpose of weight [M, K].


@define(
    "fp8_linear(Tensor x, Tensor weight, str recipe, str form) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, weight, recipe, form: (
        x.new_empty(len(x), len(weight)),
        *fake_inputs(x, len(x), 0, read_recipe(recipe)),
    ),
)
def linear(x: Tensor, weight: Tensor, recipe: str, form: str) -> tuple[Tensor, ...]:
    how = read_recipe(recipe)
    by = choose_form(form, how, x)
    blocks, kept = keep_inputs(by, x, how)
    return by.multiply(blocks, None, quantized_weights(by, [weight], how), None, how), *kept


@define(
    "fp8_linear_backward(Tensor d_out, Tensor weight, Tensor[] kept, bool[] wanted, str recipe, str form)"
    " -> (Tensor, Tensor)",
    lambda d_out, weight, kept, wanted, recipe, form: (
        d_out.new_empty((len(d_out), weight.shape[1]) if wanted[0] else 0),
        torch.empty_like(weight) if wanted[1] else d_out.new_empty(0),
    ),
)
def linear_backward(
    d_out: Tensor, weight: Tensor, kept: list[Tensor], wanted: list[bool], recipe: str, form: str
) -> tuple[Tensor, Tensor]:
    how = read_recipe(recipe)
    by = choose_form(form, how, d_out)
    dy, _, turned = quantize_gradient(by, d_out, how)
    dx = d_weight = d_out.new_empty(0)
    if wanted[0]:
        dx = by.multiply_back(dy, None, quantized_weights(by, [weight], how), None, how)
    if wanted[1]:
        inputs = inputs_along_tokens(by, kept, how)
        d_weight = by.multiply_columns(turned, inputs, None, how).view(weight.shape).to(weight.dtype)
    return dx, d_weight


class Fp8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, recipe: str, form: str) -> tuple[Tensor, ...]:
        return torch.ops.moestro.fp8_linear(x, weight, recipe, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, ctx.recipe, ctx.form = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:2]]
        found = torch.ops.moestro.fp8_linear_backward(grads[0], weight, kept, wanted, ctx.recipe, ctx.form)
        return *(gradient if needed else None for gradient, needed in zip(found, wanted, strict=True)), None, None


# Routed experts: see `reference_fp8.experts`. `matrices` as in `operators.py`. Kept: four tensors of x, the codes and
# scales of h, and order, inverse and bounds.


def _fake_experts(
    x: Tensor, matrices: list[Tensor], ids: Tensor, weights: Tensor, recipe: str, form: str
) -> tuple[Tensor, list[Tensor]]:
    gate_up, slots = matrices[0], ids.numel()
    num_experts = gate_up.shape[0] if gate_up.dim() == 3 else len(matrices) // 2
    width = gate_up.shape[-2]
    h = x.new_empty(slots, width, dtype=torch.uint8), x.new_empty(slots, -(-width // LENGTH), dtype=torch.float32)
    sorted_by = (ids.new_empty(slots), ids.new_empty(slots), ids.new_empty(num_experts + 1))
    how = read_recipe(recipe)
    return torch.empty_like(x), [*fake_inputs(x, slots, num_experts, how), *h, *sorted_by]


@define(
    "fp8_experts(Tensor x, Tensor[] matrices, Tensor ids, Tensor weights, str recipe, str form) -> (Tensor, Tensor[])",
    _fake_experts,
)
def experts(
    x: Tensor, matrices: list[Tensor], ids: Tensor, weights: Tensor, recipe: str, form: str
) -> tuple[Tensor, list[Tensor]]:
    how = read_recipe(recipe)
    by = choose_form(form, how, x)
    quantized = quantized_weights(by, matrices, how)
    gate_up, down = quantized[: len(quantized) // 2], quantized[len(quantized) // 2 :]
    num_experts = len(down) if down[0].values.dim() == 2 else len(down[0].values)
    order, inverse, bounds = sort_by_expert(ids, num_experts)
    token, by_slot = order // ids.shape[1], weights.flatten()[order].float()
    x, rows = gather_early(x, token, how)
    blocks, kept = keep_inputs(by, x, how, bounds, rows)
    h = by.multiply(blocks, rows, gate_up, bounds, how)
    h_blocks = by.quantize(h, TILE, how, bounds=bounds, keep=True)
    act = by.quantize(by.swiglu(h, by_slot), TILE, how, bounds=bounds)
    y = by.multiply(act, None, down, bounds, how)
    out = by.combine(y, inverse, bounds, ids.shape[1])
    return out, [*kept, h_blocks.codes, h_blocks.scales, order, inverse, bounds]


@define(
    "fp8_experts_backward(Tensor d_out, Tensor[] matrices, Tensor weights, Tensor[] kept, str recipe, str form)"
    " -> (Tensor, Tensor, Tensor[])",
    lambda d_out, matrices, weights, kept, recipe, form: (
        torch.empty_like(d_out),
        torch.empty_like(weights),
        [torch.empty_like(t) for t in matrices],
    ),
)
def experts_backward(
    d_out: Tensor, matrices: list[Tensor], weights: Tensor, kept: list[Tensor], recipe: str, form: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    how = read_recipe(recipe)
    by = choose_form(form, how, d_out)
    quantized = quantized_weights(by, matrices, how)
    gate_up, down = quantized[: len(quantized) // 2], quantized[len(quantized) // 2 :]
    h_codes, h_scales, order, inverse, bounds = kept[4:]
    token, by_slot = order // weights.shape[1], weights.flatten()[order].float()
    d_out, rows = gather_early(d_out, token, how)
    dy, dy_rows, dy_turned = quantize_gradient(by, d_out, how, bounds, rows)
    d_act = by.multiply_back(dy, dy_rows, down, bounds, how)
    act, dh, d_slots = by.swiglu_backward(d_act, Blocks(h_codes[:0], h_scales, h_codes), by_slot)
    act_turned = by.quantize(act, COLUMN, how, bounds=bounds)
    d_down = by.multiply_columns(dy_turned, act_turned, bounds, how)
    dh_blocks, _, dh_turned = quantize_gradient(by, dh, how, bounds, None)
    dx = by.combine(by.multiply_back(dh_blocks, None, gate_up, bounds, how), inverse, bounds, weights.shape[1])
    x_turned = inputs_along_tokens(by, kept[:4], how, bounds, rows)
    d_gate_up = by.multiply_columns(dh_turned, x_turned, bounds, how)
    d_slots[int(bounds[-1]) :] = 0
    gradients = [d_gate_up, d_down] if matrices[0].dim() == 3 else [*d_gate_up, *d_down]
    by_choice = d_slots[inverse].view(weights.shape).to(weights.dtype)
    return dx, by_choice, [d.to(t.dtype) for d, t in zip(gradients, matrices, strict=True)]


class Fp8ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, ids: Tensor, weights: Tensor, recipe: str, form: str, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        out, kept = torch.ops.moestro.fp8_experts(x, list(matrices), ids, weights, recipe, form)
        return out, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, weights, ctx.recipe, ctx.form, *matrices = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.num_matrices = len(matrices)
        ctx.save_for_backward(weights, *matrices, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, *rest = ctx.saved_tensors
        matrices, kept = rest[: ctx.num_matrices], rest[ctx.num_matrices :]
        found = torch.ops.moestro.fp8_experts_backward(grads[0], matrices, weights, kept, ctx.recipe, ctx.form)
        return found[0], None, found[1], None, None, *found[2]


for _name, _step in (
    ("fp8_linear", linear),
    ("fp8_linear_backward", linear_backward),
    ("fp8_experts", experts),
    ("fp8_experts_backward", experts_backward),
):
    LIBRARY.impl(_name, _step, "CUDA")  # plain torch, with block-wise products on Hopper
