"""Layers in FP8 as PyTorch operators: linear layers, and experts or a feed-forward layer with SwiGLU.

`reference_fp8.py` says what they compute. Here the steps of `native_fp8.py` (kernels) or `fused_fp8.py` (plain torch,
on any device) are put together, and what the backward pass reads is kept in FP8: codes and scales of inputs, along one
direction, and of the inputs of SwiGLU. The output of attention, which is quantised to E5M6, is kept as it is, because
attention keeps it as well; its codes are made again. Inputs that several layers read are quantised once. Quantised
weights are made once per change of the parameter (`forms.py`) and serve both passes and every micro-batch.

The last argument of an operator, `how`, is a recipe's key and, after a slash, the form to compute in as in
`operators.py`.
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


def choose(how: str, x: Tensor) -> tuple[Fp8Recipe, Any]:
    """The recipe, and the module with the steps: the kernels, if they run, take x and add up as the recipe says."""
    key, _, form = how.partition("/")
    recipe = read_recipe(key)
    if form == "torch" or recipe.accumulate != "fp32":
        return recipe, fused_fp8
    return recipe, native_fp8 if form == "native" or library.serves(x) else fused_fp8


def recipe_of(how: str) -> Fp8Recipe:
    """The recipe alone."""
    return read_recipe(how.partition("/")[0])


def quantized_weights(by: Any, matrices: Sequence[Tensor], recipe: Fp8Recipe) -> list[Blocks]:
    """The parameters' quantised forms, each made once per change."""
    kind = ("fp8", by.__name__, recipe.scale, recipe.tile)
    return [forms.keep(matrix, kind, lambda values: by.quantize_weight(values, recipe)) for matrix in matrices]


# Inputs x [N, K] of layers, quantised once for all layers that read them: values, scales and, to keep, codes.


@define(
    "fp8_inputs(Tensor x, str how) -> (Tensor, Tensor, Tensor)",
    lambda x, how: (
        x.new_empty(x.shape),
        x.new_empty(len(x), -(-x.shape[1] // LENGTH), dtype=torch.float32),
        x.new_empty(x.shape if keeps_codes(recipe_of(how)) else 0, dtype=torch.uint8),
    ),
)
def quantize_inputs(x: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    recipe, by = choose(how, x)
    blocks = by.quantize(x, TILE, recipe, format=recipe.inputs, keep=keeps_codes(recipe))
    return blocks.values, blocks.scales, blocks.codes


@define(
    "fp8_turned(Tensor x, str how) -> (Tensor, Tensor)",
    lambda x, how: (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(-(-len(x) // LENGTH), x.shape[1], dtype=torch.float32),
    ),
)
def turn_inputs(x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    recipe, by = choose(how, x)
    blocks = by.quantize(x, COLUMN, recipe, keep=True)
    return blocks.codes, blocks.scales


def keeps_codes(recipe: Fp8Recipe) -> bool:
    """Whether the backward pass reads the codes of the forward pass's product."""
    return recipe.inputs == "e4m3" and recipe.transpose == "requantize"


def shared_inputs(x: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and codes of x, made once while x is among the latest inputs."""
    found: tuple[Tensor, Tensor, Tensor] = forms.share(x, how, lambda t: torch.ops.moestro.fp8_inputs(t, how))
    return found


def inputs_along_tokens(
    by: Any,
    kept: tuple[Tensor, Tensor],
    recipe: Fp8Recipe,
    bounds: Tensor | None = None,
    rows: Tensor | None = None,
) -> Blocks:
    """Inputs in tiles of 128 x 1, from what was kept of them: codes and scales, or x itself for E5M6."""
    first, scales = kept
    if recipe.inputs == "e5m6":
        if recipe.transpose == "requantize":
            blocks = by.quantize(first, TILE, recipe, format="e5m6")
            spread = blocks.scales.to(first.dtype).repeat_interleave(LENGTH, 1)[:, : first.shape[1]]
            first = blocks.values * spread  # exact, as scales are powers of two
        return by.quantize(first, COLUMN, recipe, format="e5m6", bounds=bounds, rows=rows)
    if recipe.transpose == "both":
        return Blocks(by.widen(first), scales, first)
    return by.quantize(first, COLUMN, recipe, x_scales=scales, bounds=bounds, rows=rows)


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


# Linear layers: x [N, K] times the transpose of weight [M, K].


def linear(x: Tensor, weight: Tensor, recipe: Fp8Recipe, form: str = "") -> Tensor:
    """See `reference_fp8.linear`."""
    how = f"{recipe.key}/{form}"
    values, scales, codes = shared_inputs(x, how)
    kept = codes, scales
    if recipe.inputs == "e5m6":
        kept = x.detach(), codes  # attention keeps x as well
    elif recipe.transpose == "both":
        kept = torch.ops.moestro.fp8_turned(x.detach(), how)
    out: Tensor = Fp8LinearFunction.apply(x, weight, how, values, scales, *kept)
    return out


@define(
    "fp8_linear(Tensor values, Tensor scales, Tensor weight, str how) -> Tensor",
    lambda values, scales, weight, how: values.new_empty(len(values), len(weight)),
)
def linear_forward(values: Tensor, scales: Tensor, weight: Tensor, how: str) -> Tensor:
    recipe, by = choose(how, values)
    weights = quantized_weights(by, [weight], recipe)
    out: Tensor = by.multiply(Blocks(values, scales, values), None, weights, None, recipe)
    return out


@define(
    "fp8_linear_backward(Tensor d_out, Tensor weight, Tensor[] kept, bool[] wanted, str how) -> (Tensor, Tensor)",
    lambda d_out, weight, kept, wanted, how: (
        d_out.new_empty((len(d_out), weight.shape[1]) if wanted[0] else 0),
        torch.empty_like(weight) if wanted[1] else d_out.new_empty(0),
    ),
)
def linear_backward(
    d_out: Tensor, weight: Tensor, kept: list[Tensor], wanted: list[bool], how: str
) -> tuple[Tensor, Tensor]:
    recipe, by = choose(how, d_out)
    dy, _, turned = quantize_gradient(by, d_out, recipe)
    dx = d_weight = d_out.new_empty(0)
    if wanted[0]:
        dx = by.multiply_back(dy, None, quantized_weights(by, [weight], recipe), None, recipe)
    if wanted[1]:
        inputs = inputs_along_tokens(by, (kept[0], kept[1]), recipe)
        d_weight = by.multiply_columns(turned, inputs, None, recipe).view(weight.shape).to(weight.dtype)
    return dx, d_weight


class Fp8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, how: str, values: Tensor, scales: Tensor, *kept: Tensor) -> Tensor:
        return torch.ops.moestro.fp8_linear(values, scales, weight, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, ctx.how, _, _, *kept = inputs
        ctx.save_for_backward(weight, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:2]]
        found = torch.ops.moestro.fp8_linear_backward(grads[0], weight, kept, wanted, ctx.how)
        gradients = (gradient if needed else None for gradient, needed in zip(found, wanted, strict=True))
        return *gradients, None, None, None, None, None


# Routed experts. `blocks` are the values and scales of x, `matrices` as in `operators.py`. The operator gives what is
# kept besides: codes and scales of x along tokens, if `both`; those of h; order, inverse and bounds.


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, matrices: Sequence[Tensor], recipe: Fp8Recipe, form: str = ""
) -> Tensor:
    """See `reference_fp8.experts`."""
    how = f"{recipe.key}/{form}"
    out: Tensor = Fp8ExpertsFunction.apply(x, ids, weights, how, *shared_inputs(x, how), *matrices)[0]
    return out


def _fake_experts(
    x: Tensor, blocks: list[Tensor], matrices: list[Tensor], ids: Tensor, weights: Tensor, how: str
) -> tuple[Tensor, ...]:
    gate_up, slots = matrices[0], ids.numel()
    num_experts = gate_up.shape[0] if gate_up.dim() == 3 else len(matrices) // 2
    width, both = gate_up.shape[-2], recipe_of(how).transpose == "both"
    turned = x.new_empty((slots, x.shape[1]) if both else 0, dtype=torch.uint8)
    turned_scales = x.new_empty((slots // LENGTH + num_experts, x.shape[1]) if both else 0, dtype=torch.float32)
    h = x.new_empty(slots, width, dtype=torch.uint8), x.new_empty(slots, -(-width // LENGTH), dtype=torch.float32)
    sorted_by = (ids.new_empty(slots), ids.new_empty(slots), ids.new_empty(num_experts + 1))
    return torch.empty_like(x), turned, turned_scales, *h, *sorted_by


@define(
    "fp8_experts(Tensor x, Tensor[] blocks, Tensor[] matrices, Tensor ids, Tensor weights, str how)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_experts,
)
def experts_forward(
    x: Tensor, blocks: list[Tensor], matrices: list[Tensor], ids: Tensor, weights: Tensor, how: str
) -> tuple[Tensor, ...]:
    recipe, by = choose(how, x)
    values, scales = blocks
    gate_up, down = _halves(quantized_weights(by, matrices, recipe))
    num_experts = len(down) if down[0].values.dim() == 2 else len(down[0].values)
    order, inverse, bounds = sort_by_expert(ids, num_experts)
    token, by_slot = order // ids.shape[1], weights.flatten()[order].float()
    turned = Blocks(values, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.uint8))
    if recipe.transpose == "both":
        turned = by.quantize(x, COLUMN, recipe, bounds=bounds, rows=token, keep=True)
    h = by.multiply(Blocks(values, scales, values), token, gate_up, bounds, recipe)
    kept = by.quantize(h, TILE, recipe, bounds=bounds, keep=True)
    act = by.quantize(by.swiglu(h, by_slot), TILE, recipe, bounds=bounds)
    y = by.multiply(act, None, down, bounds, recipe)
    out = by.combine(y, inverse, bounds, ids.shape[1])
    return out, turned.codes, turned.scales, kept.codes, kept.scales, order, inverse, bounds


@define(
    "fp8_experts_backward(Tensor d_out, Tensor[] matrices, Tensor weights, Tensor[] kept, str how)"
    " -> (Tensor, Tensor, Tensor[])",
    lambda d_out, matrices, weights, kept, how: (
        torch.empty_like(d_out),
        torch.empty_like(weights),
        [torch.empty_like(t) for t in matrices],
    ),
)
def experts_backward(
    d_out: Tensor, matrices: list[Tensor], weights: Tensor, kept: list[Tensor], how: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    recipe, by = choose(how, d_out)
    gate_up, down = _halves(quantized_weights(by, matrices, recipe))
    codes, scales, h_codes, h_scales, order, inverse, bounds = kept
    token, by_slot = order // weights.shape[1], weights.flatten()[order].float()
    dy, rows, dy_turned = quantize_gradient(by, d_out, recipe, bounds, token)
    d_act = by.multiply_back(dy, rows, down, bounds, recipe)
    act, dh, d_slots = by.swiglu_backward(d_act, Blocks(h_codes, h_scales, h_codes), by_slot)
    d_down = by.multiply_columns(dy_turned, by.quantize(act, COLUMN, recipe, bounds=bounds), bounds, recipe)
    dh_blocks, _, dh_turned = quantize_gradient(by, dh, recipe, bounds)
    dx = by.combine(by.multiply_back(dh_blocks, None, gate_up, bounds, recipe), inverse, bounds, weights.shape[1])
    d_gate_up = by.multiply_columns(
        dh_turned, inputs_along_tokens(by, (codes, scales), recipe, bounds, token), bounds, recipe
    )
    d_slots[int(bounds[-1]) :] = 0
    gradients = [d_gate_up, d_down] if matrices[0].dim() == 3 else [*d_gate_up, *d_down]
    by_choice = d_slots[inverse].view(weights.shape).to(weights.dtype)
    return dx, by_choice, [d.to(t.dtype) for d, t in zip(gradients, matrices, strict=True)]


def _halves(matrices: list[Blocks]) -> tuple[list[Blocks], list[Blocks]]:
    half = len(matrices) // 2
    return matrices[:half], matrices[half:]


class Fp8ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, ids: Tensor, weights: Tensor, how: str, *rest: Tensor) -> tuple[Tensor, ...]:
        values, scales, _, *matrices = rest
        return torch.ops.moestro.fp8_experts(x, [values, scales], matrices, ids, weights, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, weights, ctx.how, _, scales, codes, *matrices = inputs
        _, turned, turned_scales, *kept = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.num_matrices = len(matrices)
        of_x = (codes, scales) if keeps_codes(recipe_of(ctx.how)) else (turned, turned_scales)
        ctx.save_for_backward(weights, *matrices, *of_x, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, *rest = ctx.saved_tensors
        matrices, kept = rest[: ctx.num_matrices], rest[ctx.num_matrices :]
        dx, d_weights, gradients = torch.ops.moestro.fp8_experts_backward(grads[0], matrices, weights, kept, ctx.how)
        return dx, None, d_weights, None, None, None, None, *gradients


for _name, _step in (
    ("fp8_inputs", quantize_inputs),
    ("fp8_turned", turn_inputs),
    ("fp8_linear", linear_forward),
    ("fp8_linear_backward", linear_backward),
    ("fp8_experts", experts_forward),
    ("fp8_experts_backward", experts_backward),
):
    LIBRARY.impl(_name, _step, "CUDA")  # plain torch, with block-wise products on Hopper
