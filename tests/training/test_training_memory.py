"""What training is said to need, against numbers that a real step leaves behind, and against published sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moestro.config import Config, build_config, load_preset
from moestro.data.batches import Batch
from moestro.model.transformer import Transformer
from moestro.training.loss import Counts, compute_loss
from moestro.training.memory import training_memory
from moestro.training.precision import precision_from
from moestro.training.prepare import build_model
from moestro.training.step import train_step

Make = Callable[..., Config]


def some_batch(config: Config) -> Batch:
    shape = (config.train.batch_size, config.train.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return Batch(tokens, torch.zeros_like(tokens))


def kept_by_a_pass(config: Config) -> int:
    """Bytes that a real forward pass keeps for its backward pass, parameters and text aside."""
    model, batch = Transformer(config.model, precision_from(config)), some_batch(config)
    own = {tensor.untyped_storage().data_ptr() for tensor in (batch.tokens, *model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_loss(model, batch, Counts((1, 1), 1, 1), mtp_weight=0.3)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["model.num_layers=4", "model.num_dense_layers=0", "model.num_experts=0"])
def test_activations_are_those_that_a_real_pass_keeps(make_config: Make, precision: str, layers: str) -> None:
    config = make_config(f"train.precision={precision}", layers)
    assert training_memory(config).activations == pytest.approx(kept_by_a_pass(config), rel=0.03)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_weights_gradients_and_moments_are_those_of_a_real_step(
    make_config: Make, optimizer: str, moments: str
) -> None:
    config = make_config(f"train.optimizer={optimizer}", f"train.moments={moments}")
    model, optimizers = build_model(config)
    numbers = {"lr": 1e-3, "mtp_weight": 0.3, "bias_speed": 0.0}
    token_bytes = torch.ones(config.model.vocab_size, dtype=torch.int64)
    train_step(model, optimizers, [some_batch(config)], config.train, token_bytes=token_bytes, **numbers)
    memory = training_memory(config)
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert memory.moments == sum(t.nbytes for t in optimizers.state_tensors().values() if t.dim())


def test_recompute_keeps_the_inputs_of_blocks_and_one_block(make_config: Make) -> None:
    blocks = ("model.num_layers=8", "model.num_dense_layers=0")  # and that of the MTP module, all with experts
    plain, again = (training_memory(make_config(*blocks, f"train.recompute={r}")) for r in ("false", "true"))
    inputs = 4 * 32 * 32 * 4  # sequences, tokens, width, bytes
    assert plain.activations - again.activations == 8 * plain.working - 9 * inputs


def test_where_the_precision_is_open_the_larger_need_counts(make_config: Make) -> None:
    totals = [training_memory(make_config(f"train.precision={p}")).total for p in ("fp32", "bf16", "auto")]
    assert totals[2] == max(totals[:2])


def test_published_sizes() -> None:
    """DeepSeek-V3: 671B parameters and 11.5B of its MTP module (684.5B less its shared embedding and head, 1.9B)."""
    config = build_config(load_preset("deepseek-v3"))
    memory = training_memory(config)
    assert memory.weights / 4 == pytest.approx(682.6e9, rel=0.002)
    assert memory.moments == 2 * memory.weights == 2 * memory.gradients
