"""What FP8 does to the numbers of a model, measured on one micro-batch, layer by layer.

Three kinds of numbers are quantised for every matrix: its weights, its inputs and the gradients of its outputs. Of each
kind this says, over the values that are not 0:

    error      ‖q − x‖ / ‖x‖, where q is what code · scale gives for x
    zeros      the share that became 0
    top        the share with the largest code (448 in E4M3). Nothing is cut off there: a scale is chosen such that the
               largest value of a block gets this code, so at least one value in 128 has it if scales are fp32
    low, high  the smallest and the largest scale

Layers keep nothing. For one pass, hooks collect what goes into the layers and the gradients that come back to them.
Nothing else is touched: no gradient of a parameter, no random state. What lies between the two matrices of a SwiGLU
layer is computed again, as `ops/training/reference_fp8.py` says, with products summed in fp32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moestro.data.batches import Batch
from moestro.model.experts import Experts
from moestro.model.layers import MLP, Linear
from moestro.model.transformer import Transformer
from moestro.ops import library
from moestro.ops.fp8 import SQUARE, TILE, Block, spread_scales
from moestro.ops.precision import Fp8Recipe
from moestro.ops.training import fused_fp8, native_fp8
from moestro.ops.training.reference_fp8 import LARGEST, quantize_gradient, swiglu, swiglu_gradients
from moestro.training.evaluate import Domains
from moestro.training.loss import Counts, compute_loss

TOKENS = 1024  # of the micro-batch; at least one row of it, cut if it is longer
KINDS = ("weights", "inputs", "gradients")

Stats = dict[str, float]  # error, zeros, top, low, high
Layers = dict[str, dict[str, dict[str, Stats]]]  # by block, matrix and kind


@dataclass(frozen=True)
class Quantised:
    """x [..., M, K], its codes as numbers in the same shape, and the scales of blocks."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    block: Block = TILE
    largest: float = LARGEST["e4m3"]

    @staticmethod
    def weights(matrices: Tensor, recipe: Fp8Recipe) -> Quantised:
        """A matrix [M, K] or a stack of them, in blocks of 128 x 128."""
        found = steps_for(matrices).quantize_weight(matrices, recipe)
        return Quantised(matrices, found.values, found.scales, SQUARE)

    @staticmethod
    def inputs(x: Tensor, recipe: Fp8Recipe) -> Quantised:
        """Rows [N, K], in tiles of 1 x 128 and the recipe's format."""
        found = steps_for(x).quantize(x, TILE, recipe, format=recipe.inputs)
        return Quantised(x, found.values, found.scales, largest=LARGEST[recipe.inputs])

    @staticmethod
    def gradients(d_out: Tensor, recipe: Fp8Recipe) -> Quantised:
        """Rows [N, M], as the gradient of a layer's inputs is computed from them."""
        return Quantised(d_out, *quantize_gradient(d_out, recipe))

    @staticmethod
    def join(parts: Sequence[Quantised]) -> Quantised:
        """The rows of all parts, which share block and format."""
        x, codes, scales = (torch.cat([getattr(p, name) for p in parts]) for name in ("x", "codes", "scales"))
        return replace(parts[0], x=x, codes=codes, scales=scales)

    def spread(self) -> Tensor:
        """The scale of every value."""
        return spread_scales(self.scales, self.codes.shape, self.block)

    def values(self) -> Tensor:
        """What the codes stand for, fp32."""
        return self.codes.float() * self.spread()

    def stats(self) -> Stats:
        """The numbers; NaN where every value is 0."""
        some, norm = self.x != 0, partial(torch.linalg.vector_norm, dtype=torch.float64)
        count, used = int(some.sum()), self.spread()[some]
        if not count:
            return dict.fromkeys(("error", "zeros", "top", "low", "high"), math.nan)
        return {
            "error": float(norm(self.values() - self.x) / norm(self.x)),
            "zeros": int((some & (self.codes == 0)).sum()) / count,
            "top": int((self.codes.abs() == self.largest).sum()) / count,
            "low": float(used.min()),
            "high": float(used.max()),
        }


def steps_for(x: Tensor) -> ModuleType:
    """The module that quantises x fastest."""
    return native_fp8 if library.serves(x) else fused_fp8


@dataclass
class LayerCall:
    """One call of a layer: its inputs, and the gradient of its output once that has come back."""

    block: str
    path: str
    module: nn.Module
    recipe: Fp8Recipe
    inputs: tuple[Any, ...]
    gradient: Tensor | None = None

    def receive(self, gradient: Tensor) -> None:
        """A hook of the output."""
        self.gradient = gradient

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, Stats]]:
        """The numbers of every matrix of the layer."""
        assert self.gradient is not None
        module, recipe, x = self.module, self.recipe, self.inputs[0]
        matrices: tuple[Tensor, Tensor]
        if isinstance(module, Linear):
            kinds = measure_linear(x, self.gradient, module.weight, recipe)
            return {self.path: kinds}
        if isinstance(module, Experts):
            matrices, routes = (module.gate_up, module.down), self.inputs[1]
            ids = routes.ids if routes.accepted is None else routes.ids.where(routes.accepted, -1)
            weights = routes.weights
        else:  # one expert for all rows
            assert isinstance(module, MLP)
            matrices = module.gate_up.weight[None], module.down.weight[None]
            ids, weights = x.new_zeros(len(x), 1, dtype=torch.int64), x.new_ones(len(x), 1)
        found = measure_experts(x, self.gradient, matrices, ids, weights, recipe)
        return {f"{self.path}.{name}": stats for name, stats in found.items()}


def measure_linear(x: Tensor, d_out: Tensor, weight: Tensor, recipe: Fp8Recipe) -> dict[str, Stats]:
    """The numbers of a matrix, by kind; arguments as `reference_fp8.linear_gradients`."""
    kinds = Quantised.weights(weight, recipe), Quantised.inputs(x, recipe), Quantised.gradients(d_out, recipe)
    return {kind: found.stats() for kind, found in zip(KINDS, kinds, strict=True)}


def measure_experts(
    x: Tensor, d_out: Tensor, matrices: tuple[Tensor, Tensor], ids: Tensor, weights: Tensor, recipe: Fp8Recipe
) -> dict[str, dict[str, Stats]]:
    """The numbers of `gate_up` and `down`, all experts together; arguments as `reference_fp8.experts_gradients`."""
    up, down = (Quantised.weights(stack, recipe) for stack in matrices)
    rows = Quantised.inputs(x, recipe)
    sent, up_values, down_values = rows.values(), up.values(), down.values()
    acts, gradients, d_outs = [], [], []
    for expert in ids.unique().tolist():
        if not 0 <= expert < len(up_values):  # a choice without room
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        by_choice = weights[token, slot].float()
        h = (sent[token] @ up_values[expert].T).to(x.dtype)
        acts.append(Quantised.inputs(swiglu(h, by_choice).to(x.dtype), recipe))
        d_outs.append(Quantised.gradients(d_out[token], recipe))
        d_act = (d_outs[-1].values() @ down_values[expert]).to(x.dtype)
        _, dh, _ = swiglu_gradients(d_act, Quantised.inputs(h, recipe).values(), by_choice)
        gradients.append(Quantised.gradients(dh.to(x.dtype), recipe))
    found = {"gate_up": (up, rows, Quantised.join(gradients)), "down": (down, *map(Quantised.join, (acts, d_outs)))}
    return {
        name: {kind: quantised.stats() for kind, quantised in zip(KINDS, kinds, strict=True)}
        for name, kinds in found.items()
    }


def recipe_of(module: nn.Module) -> Fp8Recipe | None:
    """How a layer multiplies in FP8; None for anything else."""
    if isinstance(module, MLP):
        module = module.gate_up
    precision = module.precision if isinstance(module, (Linear, Experts)) else None
    return precision if isinstance(precision, Fp8Recipe) else None


def measure_fp8(
    model: Transformer, batch: Batch, *, mtp_weight: float, share: float = 1.0, mask_documents: bool = True
) -> Layers:
    """The numbers of every matrix in FP8, by block, matrix and kind.

    Gradients are those of the mean loss of `batch` times `share`, its part of a step's tokens, so that their scales are
    those of training. The model is left in evaluation mode.
    """
    model.eval()
    calls: list[LayerCall] = []

    def collect(block: str, path: str, recipe: Fp8Recipe) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls.append(LayerCall(block, path, module, recipe, inputs))
            output.register_hook(calls[-1].receive)

        return hook

    hooks = [
        module.register_forward_hook(collect(name, path, recipe))
        for name, block in model.blocks()
        for path, module in block.named_modules()
        if (recipe := recipe_of(module))
    ]
    try:
        counts = Counts.of([batch], len(model.mtp))
        result = compute_loss(model, batch, counts, mtp_weight=mtp_weight, mask_documents=mask_documents)
        torch.autograd.grad(result.terms.total * share, model.embed.weight)  # of no other parameter, kept nowhere
    finally:
        for hook in hooks:
            hook.remove()
    layers: Layers = {}
    for call in calls:
        layers.setdefault(call.block, {}).update(call.measure())
    return layers


def choose_rows(domains: Domains, tokens: int = TOKENS) -> Batch | None:
    """About `tokens` tokens from the beginnings of all domains in turn, at least one row; None without text."""
    batches = [next(start(), None) for start in domains.values()]
    rows = [list(zip(batch.tokens, batch.segments, strict=True)) for batch in batches if batch is not None]
    in_turn = [row for turn in itertools.zip_longest(*rows) for row in turn if row is not None]
    if not in_turn:
        return None
    width = min(len(in_turn[0][0]) - 1, tokens)
    ids, segments = zip(*in_turn[: tokens // width], strict=True)
    return Batch(torch.stack(ids)[:, : width + 1], torch.stack(segments)[:, : width + 1])
