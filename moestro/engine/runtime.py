"""A served model over a paged cache: its forward passes, each written down once and run as one native call.

Where the kernels cannot run, a pass is carried out operation by operation. The layers are in `model/served.py`, their
packed parts come from `checkpoints/packing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from moestro.checkpoints.packed import Save
from moestro.checkpoints.packing import Packer, Source
from moestro.config import ModelConfig
from moestro.engine.paged_cache import PagedCache, StepInput
from moestro.model.served import ServedBlock, ServedMTP, ServedNorm
from moestro.model.transformer import Block, MTPModule
from moestro.ops import library
from moestro.ops.serving.program import Eager, Operand, Operations, Tape, Value
from moestro.ops.serving.weights import PackedExperts


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D] after the final norm; expert ids [L, N, A] of every MoE layer passed through, in order."""

    hidden: Tensor
    ids: Tensor


class Forward(Protocol):
    """Inputs [N, 1, D], the first cache layer to use -> [N, 1, D]."""

    def __call__(self, rows: Operations[Value], inputs: Sequence[Value], layer: int) -> Value: ...


class Pass:
    """A forward pass through some blocks: on a tape made once where the kernels are built, else operation by operation.

    Experts that the token id alone decides are looked up before it begins.
    """

    def __init__(
        self,
        forward: Forward,
        blocks: Sequence[ServedBlock],
        layer: int,
        dtype: torch.dtype,
        hidden_dim: int,
        *,
        num_inputs: int = 1,
    ) -> None:
        self.forward, self.layer, self.dtype = forward, layer, dtype
        self.routers = [block.router for block in blocks if block.router is not None]
        self.tape: Tape | None = None
        if library.is_available():
            self.tape = Tape(dtype)
            self.inputs = [self.tape.value(hidden_dim) for _ in range(num_inputs)]
            self.output: Operand = forward(self.tape, self.inputs, layer)

    def __call__(self, inputs: Sequence[Tensor], step: StepInput, cache: PagedCache) -> StepOutput:
        """Inputs [N, D] of any type."""
        ids = step.tokens.new_empty(len(self.routers), len(step.tokens), cache.routes.shape[-1])
        for router, chosen in zip(self.routers, ids, strict=True):
            if router.hashed:
                chosen.copy_(router.choose(chosen, step.tokens))
        if self.tape is not None:
            hidden = self.tape.run(list(zip(self.inputs, inputs, strict=True)), step, cache.layers, ids, self.output)
            return StepOutput(hidden, ids)
        eager = Eager(step, cache.layers, ids)
        return StepOutput(self.forward(eager, [x.to(self.dtype)[:, None] for x in inputs], self.layer).flatten(1), ids)


class Runtime:
    """A model with its matrices packed as `weights` (fp32, bf16, int8, int4; None: as they are computed with).

    `source` is a model, a model's files, or files of packed weights, which stay mapped. Embeddings, norms and routers
    stay as they are, and the head has 8 bits at least. `tensors` is all that is kept, by name: what to save. It goes to
    `save` part by part, where that is given; what remains is an outline that computes nothing.
    `routed_bytes` and `other_bytes` are what the main model's packed matrices take: all routed experts, and what every
    token reads.
    """

    def __init__(self, source: Source, weights: str | None = None, save: Save | None = None) -> None:
        packer = Packer(source, weights, save)
        model, config = packer.model, packer.model.config
        self.config: ModelConfig = config
        self.dtype, self.format = packer.dtype, packer.format
        self.embedding = packer.plain("embed.weight")
        head = "embed.weight" if config.tie_embeddings else "head.weight"
        self.head = packer.linear("head", head, format="int8" if self.format == "int4" else None)
        self.norm = ServedNorm(model.norm, packer.at("norm"))
        layers, modules = cast(list[Block], model.layers), cast(list[MTPModule], model.mtp)
        self.blocks = [ServedBlock(block, packer.at(f"layers.{i}")) for i, block in enumerate(layers)]
        sizes = [(part.nbytes, isinstance(part, PackedExperts)) for part in packer.parts.values()]
        self.routed_bytes = sum(size for size, is_routed in sizes if is_routed)
        self.other_bytes = sum(size for size, is_routed in sizes if not is_routed)
        self.mtp = [ServedMTP(module, packer.at(f"mtp.{k}")) for k, module in enumerate(modules)]
        self.tensors = packer.finish()
        shape = (self.dtype, config.hidden_dim)
        self._main = Pass(self._compute, self.blocks, 0, *shape)
        depths = enumerate(self.mtp, config.num_layers)
        self._ahead = [Pass(module, [module.block], layer, *shape, num_inputs=2) for layer, module in depths]

    def forward(self, step: StepInput, cache: PagedCache) -> StepOutput:
        """Compute the tokens of a step; their rows are written to the cache."""
        return self._main([self.embedding.index_select(0, step.tokens)], step, cache)

    def forward_mtp(self, depth: int, hidden: Tensor, step: StepInput, cache: PagedCache) -> Tensor:
        """Module `depth` (from 0) on the hidden states [N, D] of the depth before -> its own [N, D].

        `step.tokens` are the tokens 1 + depth ahead of the positions; rows go to the module's own cache layer.
        """
        embedded = self.embedding.index_select(0, step.tokens)
        return self._ahead[depth]([embedded, hidden], step, cache).hidden

    def _compute(self, rows: Operations[Value], inputs: Sequence[Value], layer: int) -> Value:
        (x,), index = inputs, 0
        for block in self.blocks:
            x = block(rows, x, layer, index)
            layer, index = layer + 1, index + (block.router is not None)
        return self.norm(rows, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V] fp32."""
        return self.head(hidden).float()
