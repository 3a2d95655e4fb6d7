"""A served model over a paged cache: each forward pass is recorded once and runs as one native call.

Where the kernels cannot run, a pass runs operation by operation, with the products of torch's library
(`ops/serving/plain.py`). The layers are in `model/served.py`; their packed
parts come from `checkpoints/packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.checkpoints.packing import PackedModel, refill
from moestro.engine.paged_cache import PagedCache, StepInput
from moestro.engine.scheduler import pages_for
from moestro.errors import ConfigError
from moestro.model.attention import check_cache
from moestro.model.parts import Parts, count_bytes, saved_tensors
from moestro.model.served import ServedBlock, ServedMTP, ServedNorm
from moestro.model.transformer import Transformer
from moestro.ops import library
from moestro.ops.abi import SCORES
from moestro.ops.serving import plain
from moestro.ops.serving.program import Eager, Operand, Operations, Tape, Value
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear

SCORED_ROWS = 1024  # rows whose logits over the whole vocabulary are in memory at a time
CHOOSE = -1  # as an expert id: the router chooses


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D] after the final norm; expert ids [L, N, A] of every MoE layer passed through, in order."""

    hidden: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Texts:
    """Whole sequences to score, one after another: sequence s is tokens[starts[s] : starts[s + 1]].

    tokens [N] int64; targets [N] int64, negative where there is none; `ids` [L, N, A] int64 if routes are replayed, see
    `Runtime.forward`.
    """

    tokens: Tensor
    starts: Sequence[int]
    targets: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """nll [N] fp32 in nats, 0 without a target; argmax [N] int64, −1 without one; expert ids [L, N, A]."""

    nll: Tensor
    argmax: Tensor
    ids: Tensor


class Forward(Protocol):
    """Inputs [N, 1, D], the first cache layer to use -> [N, 1, D]."""

    def __call__(self, rows: Operations[Value], inputs: Sequence[Value], layer: int) -> Value: ...


class Pass:
    """A forward pass through some blocks: on a tape made once if the kernels are built, else operation by operation.

    Experts that the token id alone decides are looked up before the pass.
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
        self.selections = [block.selection for block in blocks if block.selection is not None]
        self.tape: Tape | None = None
        if library.is_available() and all(route.score in SCORES for route in self.selections):
            self.tape = Tape(dtype)
            self.inputs = [self.tape.value(hidden_dim) for _ in range(num_inputs)]
            self.output: Operand = forward(self.tape, self.inputs, layer)

    def __call__(
        self, inputs: Sequence[Tensor], step: StepInput, cache: PagedCache, ids: Tensor | None = None
    ) -> StepOutput:
        """Inputs [N, D] of any type; `ids`: see `Runtime.forward`."""
        ids = self._begin_routes(step.tokens, cache.routes.shape[-1], ids)
        if self.tape is not None:
            hidden = self.tape.run(list(zip(self.inputs, inputs, strict=True)), step, cache.layers, ids, self.output)
            return StepOutput(hidden, ids)
        eager = (plain.Plain if plain.computes() else Eager)(step, cache.layers, ids)
        return StepOutput(self.forward(eager, [x.to(self.dtype)[:, None] for x in inputs], self.layer).flatten(1), ids)

    def _begin_routes(self, tokens: Tensor, top_k: int, replayed: Tensor | None) -> Tensor:
        """The ids [L, N, A] that are known before the pass: replayed, or hashed from the tokens."""
        shape = (len(self.selections), len(tokens), top_k)
        ids = tokens.new_full(shape, CHOOSE)
        if replayed is not None:
            check_routes(replayed, shape, self.selections[0].bias.shape[0] if self.selections else 0)
            ids.copy_(replayed)
        for selection, known in zip(self.selections, ids, strict=True):
            if selection.hashed:
                known.copy_(torch.where(known == CHOOSE, selection.hash(tokens), known))
        return ids


class Runtime:
    """A model that computes with packed parts; `format` says how its matrices are kept (fp32, bf16, int8, int4).

    `cache` says how its rows are cached, in an engine and in `score`: auto (in the type of activations) or fp8.
    ConfigError for a cache that the model cannot have. `activations` fp8 rounds rows to E4M3 in tiles of 128 before
    they meet fp8 weights, as DeepSeek's inference does (auto: rows stay as they are); ConfigError if there are none.

    Embeddings, norms and biases stay as they are, routers stay in fp32, and the head has at least 8 bits.
    `routed_bytes` is the size of the main model's packed routed experts, `other_bytes` that of the packed matrices
    every token reads. `num_updates` tells which weights something was computed with.
    """

    def __init__(self, packed: PackedModel, cache: str = "auto", activations: str = "auto") -> None:
        check_cache(packed.config, cache)
        _round_rows(packed, activations)
        self.packed, self.num_updates, self.cache = packed, 0, cache
        self.is_plain = plain.computes()
        if self.is_plain:
            plain.open_parts(packed.parts.values(), packed.dtype)
        self.config, self.dtype, self.format = packed.config, packed.dtype, packed.format
        config, parts = packed.config, Parts(packed.parts)
        self.embedding, self.head = parts.plain("embed.weight"), parts.linear("head")
        self.norm = ServedNorm(config.norm_eps, parts.at("norm"))
        self.blocks = [ServedBlock(config, i, parts.at(f"layers.{i}")) for i in range(config.num_layers)]
        self.mtp = [ServedMTP(config, k, parts.at(f"mtp.{k}")) for k in range(config.mtp_depth)]
        main = {name: part for name, part in packed.parts.items() if not name.startswith("mtp.")}
        self.routed_bytes = count_bytes(main, [PackedExperts])
        self.other_bytes = count_bytes(main, [PackedLinear, PackedHeads])
        shape = (self.dtype, config.hidden_dim)
        self._main = Pass(self._compute, self.blocks, 0, *shape)
        depths = enumerate(self.mtp, config.num_layers)
        self._ahead = [Pass(module, [module.block], layer, *shape, num_inputs=2) for layer, module in depths]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, packed."""
        return sum(part.nbytes for part in self.packed.parts.values())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of weights that stay in mapped files, 0 if they have their own memory."""
        return self.nbytes if self.packed.mapped else 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the model, by the names under which they are saved."""
        saved = [saved_tensors(name, part) for name, part in self.packed.parts.items()]
        return {name: tensor for tensors in saved for name, tensor in tensors.items()}

    @torch.inference_mode()
    def update(self, model: Transformer) -> None:
        """Take the weights of another model of the same configuration, in place: passes and memory stay.

        Caches still hold results of the old weights, so update an engine with `Engine.update`. ConfigError for another
        configuration, and if the weights are mapped from packed files; then nothing changes.
        """
        refill(self.packed, model)
        self.num_updates += 1

    def forward(self, step: StepInput, cache: PagedCache, ids: Tensor | None = None) -> StepOutput:
        """Compute the tokens of a step and write their rows to the cache.

        `ids` [L, N, A] int64 are experts to use instead of those that the routers would choose; their weights are the
        routers' own scores. For rows of −1 the routers choose as usual. ValueError for ids that do not fit.
        """
        return self._main([self.embedding.index_select(0, step.tokens)], step, cache, ids)

    def forward_mtp(self, depth: int, hidden: Tensor, step: StepInput, cache: PagedCache) -> Tensor:
        """Module `depth` (from 0) on the hidden states [N, D] of the depth before -> its own [N, D].

        `step.tokens` are the tokens 1 + depth ahead of the positions; rows go to the module's own cache layer.
        """
        embedded = self.embedding.index_select(0, step.tokens)
        return self._ahead[depth]([embedded, hidden], step, cache).hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V] fp32."""
        return (plain.linear(self.head, hidden) if self.is_plain else self.head(hidden)).float()

    @torch.inference_mode()
    def score(self, batches: Iterable[Texts]) -> Iterator[Scores]:
        """How well the model predicts the targets of texts, batch by batch, with the experts that it chose.

        One cache serves all batches; it grows with the largest. MTP modules do not take part.
        """
        cache: PagedCache | None = None
        for texts in batches:
            parts, num_pages = [], 0
            for first, last in pairwise(texts.starts):
                pages = range(num_pages, num_pages := num_pages + pages_for(last - first))
                parts.append((texts.tokens[first:last].tolist(), 0, pages))
            if cache is None or len(cache.routes) < num_pages:
                cache = None  # frees it before the next one is made
                cache = PagedCache(self.config, num_pages, self.dtype, self.cache)
            output = self.forward(cache.prepare(parts), cache, texts.ids)
            yield self._score(output, texts.targets)

    def _score(self, output: StepOutput, targets: Tensor) -> Scores:
        nll, argmax = torch.zeros(len(targets)), torch.full_like(targets, -1)
        for rows in (targets >= 0).nonzero().flatten().split(SCORED_ROWS):
            logits = self.logits(output.hidden[rows])
            nll[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
            argmax[rows] = logits.argmax(-1)
        return Scores(nll, argmax, output.ids)

    def _compute(self, rows: Operations[Value], inputs: Sequence[Value], layer: int) -> Value:
        (x,), index = inputs, 0
        for block in self.blocks:
            x = block(rows, x, layer, index)
            layer, index = layer + 1, index + (block.selection is not None)
        return self.norm(rows, x)


def check_routes(ids: Tensor, shape: tuple[int, ...], num_experts: int) -> None:
    """Raise ValueError if expert ids to replay have another shape or name experts that do not exist."""
    if tuple(ids.shape) != shape or ids.is_floating_point():
        raise ValueError(f"expert ids {list(ids.shape)} of {ids.dtype} where [layers, tokens, top_k] are {list(shape)}")
    chosen = ids == CHOOSE
    if (((ids < 0) | (ids >= num_experts)) & ~chosen).any() or (chosen.any(-1) != chosen.all(-1)).any():
        raise ValueError(f"expert ids must lie between 0 and {num_experts - 1}, or be {CHOOSE} for all of a token")


def _round_rows(packed: PackedModel, activations: str) -> None:
    """Say to the products with fp8 weights whether they round rows to fp8."""
    if activations not in ("auto", "fp8"):
        raise ConfigError(f"activations must be auto or fp8, not '{activations}'")
    matrices = [part for part in packed.parts.values() if isinstance(part, (PackedLinear, PackedExperts))]
    coded = [matrix for matrix in matrices if matrix.format == "fp8"]
    if activations == "fp8" and not coded:
        raise ConfigError(f"activations in fp8 need weights in fp8, and these are {packed.format}")
    for matrix in coded:
        matrix.rounds_rows = activations == "fp8"
