"""How much memory training takes, from its configuration alone: nothing is allocated and nothing is computed.

    weights       fp32, the master weights
    gradients     fp32, as many
    moments       of the optimizer: two for each weight under AdamW, one for a matrix inside a block under Muon
    copies        of matrices in the precision of products
    activations   what the forward pass of one micro-batch keeps for the backward pass, gradients of the head included
    working       temporaries, about what one more block keeps

Activations are counted on a forward pass over FakeTensors, which have shapes and no memory, so that the count cannot
drift from the code: one block of each kind is traced, and counts for all. All parts are there at once at the end of a
forward pass that is not the first. It is what must fit at least: Python and torch come on top, and gaps that the
allocator leaves between gradients and activations, up to a fifth in models of 100M parameters (docs/machines.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from moestro.config import Config, ModelConfig
from moestro.data.batches import Batch
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer
from moestro.ops.precision import compute_dtype
from moestro.training.loss import Counts, compute_loss
from moestro.training.optim import Optimizers, moment_dtype
from moestro.training.precision import precision_from

COPY_BYTES = {"fp32": 0, "bf16": 2, "fp8": 3}  # of a weight in the precision of products; fp8: a code and its value


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of each part; see the module."""

    weights: int
    gradients: int
    moments: int
    copies: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values())


def training_memory(config: Config) -> TrainingMemory:
    """What a process that trains alone needs. Where the precision is still to be chosen, the larger of the two."""
    if config.train.precision == "auto":
        both = [config.model_copy(update={"train": _with_precision(config, name)}) for name in ("fp32", "bf16")]
        return max(map(training_memory, both), key=lambda memory: memory.total)
    with torch.device("meta"):
        model = Transformer(config.model, precision_from(config))
    activations, block = count_activations(config)
    values = sum(parameter.numel() for parameter in model.parameters())
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not _is_looked_up(name))
    moments = Optimizers(model, config.train).count_moments() * moment_dtype(config.train).itemsize
    copies = products * COPY_BYTES[config.train.precision]
    return TrainingMemory(4 * values, 4 * values, moments, copies, activations, block)


def _with_precision(config: Config, name: str) -> Any:
    return config.train.model_copy(update={"precision": name})


def _is_looked_up(parameter: str) -> bool:
    """Whether no product in the precision of training reads a parameter."""
    return parameter.startswith("embed.") or ".router." in parameter


def count_activations(config: Config) -> tuple[int, int]:
    """Bytes that a forward pass of one micro-batch keeps, and those of the largest block."""
    model, kept = config.model, _Kept(config)
    of_blocks = [kept.by_kind[model.is_moe(index)] for index in range(model.num_layers + model.mtp_depth)]
    if not config.train.recompute:
        return kept.beside + sum(of_blocks), max(of_blocks)
    tokens = config.train.batch_size * config.train.seq_len
    inputs = tokens * model.hidden_dim * compute_dtype(precision_from(config)).itemsize
    return kept.beside + len(of_blocks) * inputs + max(of_blocks), max(of_blocks)


class _Kept:
    """What a forward pass keeps: in a block, by whether it has experts (`by_kind`), and `beside` all blocks."""

    def __init__(self, config: Config) -> None:
        self._bytes: dict[int, int] = {}
        self._storages: list[Any] = []  # kept alive, because the address of a storage identifies it
        self.by_kind: dict[bool, int] = {}
        train = config.train
        tokens = torch.zeros(train.batch_size, train.seq_len + 1, dtype=torch.int64)
        batch, attention = Batch(tokens, tokens), AttentionBatch.causal(train.batch_size, train.seq_len)
        with FakeTensorMode(allow_non_fake_inputs=True), saved_tensors_hooks(self._keep, lambda tensor: tensor):
            model = Transformer(one_of_each(config.model), precision_from(config))
            for tensor in (tokens, *model.parameters(), *model.buffers()):  # there anyway
                self._keep(tensor, 0)
            for index, (_, block) in enumerate(model.blocks()):
                self._watch(block, model.config.is_moe(index))
            ones = Counts((1,) * (1 + len(model.mtp)), 1, 1)
            compute_loss(model, batch, ones, mtp_weight=1.0, attention=attention)
        blocks = [self.by_kind[model.config.is_moe(index)] for index in range(len(model.blocks()))]
        self.beside = sum(self._bytes.values()) - sum(blocks)

    def _keep(self, tensor: Tensor, size: int | None = None) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._bytes:
            self._storages.append(storage)
            self._bytes[storage._cdata] = storage.nbytes() if size is None else size
        return tensor

    def _watch(self, block: nn.Module, is_moe: bool) -> None:
        def begin(*_: Any) -> None:
            self._before = sum(self._bytes.values())

        def end(*_: Any) -> None:
            self.by_kind[is_moe] = sum(self._bytes.values()) - self._before

        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)


def one_of_each(config: ModelConfig) -> ModelConfig:
    """The same model with one block of each kind that it has; MTP modules stay."""
    kinds = [config.is_moe(index) for index in range(config.num_layers)]
    dense, moe = int(False in kinds), int(True in kinds)
    return config.model_copy(update={"num_layers": dense + moe, "num_dense_layers": dense, "moe_every": 1})
