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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moestro.data.batches import Batch
from moestro.model.experts import Experts
from moestro.model.layers import MLP, Linear
from moestro.model.transformer import Transformer
from moestro.ops.fp8 import SQUARE, TILE, Block, spread_scales
from moestro.ops.precision import Fp8Recipe
from moestro.ops.training import reference_fp8 as fp8
from moestro.training.evaluate import Domains
from moestro.training.loss import Counts, compute_loss

TOKENS = 1024  # of the micro-batch; at least one row of it, cut if it is longer
KINDS = ("weights", "inputs", "gradients")

Stats = dict[str, float]  # error, zeros, top, low, high
Layers = dict[str, dict[str, dict[str, Stats]]]  # by block, matrix and kind


@dataclass
class Sums:
    """Sums over quantised values that are not 0."""

    error: float = 0.0
    norm: float = 0.0
    count: int = 0
    zeros: int = 0
    top: int = 0
    low: float = math.inf
    high: float = 0.0

    def add(self, x: Tensor, codes: Tensor, scales: Tensor, block: Block = TILE, largest: float = 448.0) -> Tensor:
        """Count x [N, K] with its codes and scales; returns what the codes stand for, [N, K] fp32."""
        x, codes, spread = x.float(), codes.float(), spread_scales(scales, x.shape, block)
        values, some = codes * spread, x != 0
        self.error += float((values - x).square().sum(dtype=torch.float64))
        self.norm += float(x.square().sum(dtype=torch.float64))
        self.count += int(some.sum())
        self.zeros += int((some & (codes == 0)).sum())
        self.top += int((codes.abs() == largest).sum())
        self.low = min(self.low, float(spread.where(some, math.inf).min()))
        self.high = max(self.high, float(spread.where(some, 0.0).max()))
        return values

    def stats(self) -> Stats:
        """The numbers; NaN if every value is 0."""
        if not self.count:
            return dict.fromkeys(("error", "zeros", "top", "low", "high"), math.nan)
        shares = {"zeros": self.zeros / self.count, "top": self.top / self.count}
        return {"error": math.sqrt(self.error / self.norm), **shares, "low": self.low, "high": self.high}


@dataclass
class Matrix:
    """The sums of one matrix, or of the same matrix of all experts."""

    recipe: Fp8Recipe
    sums: dict[str, Sums] = field(default_factory=lambda: {kind: Sums() for kind in KINDS})

    def add_weight(self, weight: Tensor) -> Tensor:
        """A matrix [M, K], in blocks of 128 x 128."""
        return self.sums["weights"].add(weight, *fp8.quantize(weight, SQUARE, self.recipe), SQUARE)

    def add_inputs(self, x: Tensor) -> Tensor:
        """Rows [N, K], in tiles of 1 x 128 and the recipe's format."""
        format = self.recipe.inputs
        return self.sums["inputs"].add(x, *fp8.quantize(x, TILE, self.recipe, format), TILE, fp8.LARGEST[format])

    def add_gradients(self, d_out: Tensor) -> Tensor:
        """Rows [N, M], as the gradient of the inputs is computed from them."""
        return self.sums["gradients"].add(d_out, *fp8.quantize_gradient(d_out, self.recipe))

    def stats(self) -> dict[str, Stats]:
        """By kind."""
        return {kind: sums.stats() for kind, sums in self.sums.items()}


@dataclass
class Call:
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
            matrix = Matrix(recipe)
            matrix.add_weight(module.weight)
            matrix.add_inputs(x)
            matrix.add_gradients(self.gradient)
            return {self.path: matrix.stats()}
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


def measure_experts(
    x: Tensor, d_out: Tensor, matrices: Sequence[Tensor], ids: Tensor, weights: Tensor, recipe: Fp8Recipe
) -> dict[str, dict[str, Stats]]:
    """The numbers of `gate_up` [E, 2F, D] and `down` [E, D, F], all experts together; arguments as `fp8.experts`."""
    up, down = Matrix(recipe), Matrix(recipe)
    x_hat = up.add_inputs(x)
    for expert, (gate_up, out) in enumerate(zip(*matrices, strict=True)):
        gate_up, out = up.add_weight(gate_up), down.add_weight(out)
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        by_choice = weights[token, slot].float()
        h = (x_hat[token] @ gate_up.T).to(x.dtype)
        down.add_inputs(fp8.swiglu(h, by_choice).to(x.dtype))
        d_act = (down.add_gradients(d_out[token]) @ out).to(x.dtype)
        kept = fp8.read_back(*fp8.quantize(h, TILE, recipe))
        up.add_gradients(fp8.swiglu_gradients(d_act, kept, by_choice)[1].to(x.dtype))
    return {"gate_up": up.stats(), "down": down.stats()}


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
    calls: list[Call] = []

    def collect(block: str, path: str, recipe: Fp8Recipe) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls.append(Call(block, path, module, recipe, inputs))
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
