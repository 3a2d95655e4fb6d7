"""Schedules at their corners; AdamW against its formula; Muon's orthogonal updates; state by name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from moestro.config import Config, TrainConfig
from moestro.errors import CheckpointError
from moestro.model.transformer import Transformer, init_weights
from moestro.training.optim import Muon, Optimizers, bias_speed, lr_factor, mtp_weight, orthogonalize


def test_learning_rate_warms_up_holds_and_decays() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, decay_fraction=0.3, final_lr_ratio=0.05)
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert set(factors[10:70]) == {1.0}
    assert all(a > b for a, b in pairwise(factors[69:]))
    assert 0.05 < factors[-1] < 0.09


def test_weight_of_mtp_and_speed_of_biases_change_late() -> None:
    config = TrainConfig()
    assert [mtp_weight(step, 9, config) for step in (0, 5, 6, 8)] == [0.3, 0.3, 0.1, 0.1]
    assert [bias_speed(step, 100, 0.001, 0.1) for step in (0, 89, 90, 99)] == [0.001, 0.001, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (3, 12, 20)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result.float())
    assert result.shape == matrices.shape
    assert float(values.max()) < 1.35
    assert float(values.median()) > 0.6
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ vh
    assert float(torch.cosine_similarity(result.flatten(), nearest.flatten(), dim=0)) > 0.95


def build(config: Config) -> tuple[Transformer, Optimizers]:
    model = Transformer(config.model)
    init_weights(model, 0)
    return model, Optimizers(model, config.train)


def set_gradients(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_follows_its_formula_and_spares_norms_the_decay(make_config: Callable[..., Config]) -> None:
    config = make_config("train.weight_decay=0.1")
    model, optimizers = build(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model)
    optimizers.step(0.01)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        decay = 0.1 if parameter.dim() > 1 else 0.0
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_muon_moves_matrices_of_blocks_by_rms_of_adamw(make_config: Callable[..., Config]) -> None:
    config = make_config("train.optimizer=muon", "train.weight_decay=0")
    model, optimizers = build(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model)
    optimizers.step(0.01)
    stepped = {name for o in optimizers.all[1:] for p in o.state for name in [optimizers.names[p]]}
    assert "layers.1.ffn.experts.gate_up" in stepped and "layers.1.attention.kv_up.weight" in stepped
    assert not stepped & {"embed.weight", "head.weight", "norm.weight", "layers.1.ffn.router.weight"}
    for name, parameter in model.named_parameters():
        rms = float((parameter.detach() - before[name]).pow(2).mean().sqrt()) / 0.01
        assert 0.1 < rms < 1.2, name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("halves", [False, True])
def test_muon_on_stacks_is_torchs_on_each_matrix(halves: bool) -> None:
    """torch's takes single matrices and computes in bf16; ours takes stacks of them, and two matrices in one."""
    generator = torch.Generator().manual_seed(2)
    stack = torch.nn.Parameter(torch.randn(3, 24, 16, generator=generator))
    pieces = stack.detach().unflatten(1, (2, 12)).flatten(0, 1) if halves else stack.detach()
    single = [torch.nn.Parameter(matrix.clone()) for matrix in pieces]
    ours = Muon([{"params": [stack], "halves": halves}], lr=0.1, weight_decay=0.3, dtype=torch.bfloat16)
    theirs = torch.optim.Muon(single, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(stack.shape, generator=generator)
        stack.grad = gradient
        for parameter, part in zip(single, gradient.reshape(pieces.shape), strict=True):
            parameter.grad = part.clone()
        ours.step()
        theirs.step()
    expected = torch.stack([parameter.detach() for parameter in single]).reshape(stack.shape)
    torch.testing.assert_close(stack.detach(), expected, atol=4e-3, rtol=0)  # three updates of 0.1, each within bf16


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_back_exactly(make_config: Callable[..., Config], kind: str) -> None:
    config = make_config(f"train.optimizer={kind}")
    (one, first), (two, second) = build(config), build(config)
    set_gradients(one)
    first.step(0.01)
    two.load_state_dict(one.state_dict())
    second.load_state_tensors({name: value.clone() for name, value in first.state_tensors().items()})
    for model, optimizers in ((one, first), (two, second)):
        set_gradients(model)
        optimizers.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="nowhere"):
        second.load_state_tensors({"nowhere/exp_avg": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        second.load_state_tensors({"norm.weight/exp_avg": torch.zeros(2)})
