"""Schedules at their corners; AdamW against its formula, moments in bf16; Muon's orthogonal updates; state by name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moestro.config import SLOWEST_BF16_BETA, Config, TrainConfig, build_config
from moestro.errors import CheckpointError, ConfigError
from moestro.model.transformer import Transformer, init_weights
from moestro.training import optim
from moestro.training.optim import Bf16AdamW, Muon, Optimizers, bias_speed, lr_factor, mtp_weight, orthogonalize


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


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_adamw_follows_its_formula_and_spares_norms_the_decay(make_config: Callable[..., Config], moments: str) -> None:
    config = make_config("train.weight_decay=0.1", f"train.moments={moments}")
    model, optimizers = build(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model)
    optimizers.step(0.01)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        decay = 0.1 if parameter.dim() > 1 else 0.0
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_moments_in_bf16_are_torchs_rounded_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "PIECE", 64)
    shapes, settings = [(7, 33), (5,), (2, 3, 64), (64, 2)], {"lr": 0.01, "betas": (0.9, 0.95)}
    ours, theirs, exact = ([torch.nn.Parameter(noise(shape, 0)) for shape in shapes] for _ in range(3))
    groups = [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:]}]
    first = Bf16AdamW(groups, **settings)  # type: ignore[arg-type]
    others = []
    for parameters in (theirs, exact):
        pair = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
        others.append(torch.optim.AdamW(pair, fused=True, **settings))  # type: ignore[arg-type]
    for step in range(20):
        for same in zip(ours, theirs, exact, strict=True):
            for parameter in same:
                parameter.grad = noise(tuple(parameter.shape), 1 + step)
        ours[3].grad = noise((2, 64), 1 + step).T  # not contiguous
        theirs[3].grad = exact[3].grad = noise((2, 64), 1 + step).T.contiguous()
        for optimizer in (first, *others):
            optimizer.step()
        for state in others[0].state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(state[key].bfloat16())
    for one, two, three in zip(ours, theirs, exact, strict=True):
        assert torch.equal(one, two)
        # 20 steps of 0.01, each with moments within 2⁻⁸: the root of one and the other
        torch.testing.assert_close(one, three, rtol=0, atol=20 * 0.01 * 2**-8)
        for key in ("exp_avg", "exp_avg_sq"):
            assert first.state[one][key].dtype == torch.bfloat16
            assert torch.equal(first.state[one][key].float(), others[0].state[two][key])
        assert first.state[one]["step"] == 20


@pytest.mark.parametrize("beta", [0.95, SLOWEST_BF16_BETA])
def test_moments_in_bf16_shrink_after_the_last_gradient(beta: float) -> None:
    """From every significand, to 0 or what is next to it; with a slower average, they would never move again."""
    start = torch.arange(128, 256).float() * 2**-20
    parameter = torch.nn.Parameter(torch.zeros(128))
    optimizer = Bf16AdamW([{"params": [parameter]}], lr=0.0, betas=(beta, beta))
    parameter.grad = torch.zeros(128)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[parameter][key].copy_(start)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        assert bool((optimizer.state[parameter][key].float() < start).all())
    assert torch.equal((start * 0.999).bfloat16().float()[1:], start[1:])


def test_averages_too_slow_for_bf16_are_refused() -> None:
    for betas in ("[0.9, 0.999]", "[0.999, 0.95]"):
        overrides = ["train.moments=bf16", f"train.betas={betas}"]
        with pytest.raises(ConfigError, match=r"moments in bf16 need betas of at most 0\.996.*train\.moments=fp32"):
            build_config({}, overrides)
        build_config({}, overrides[1:])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_in_bf16_take_half_the_memory(make_config: Callable[..., Config], kind: str) -> None:
    sizes = {}
    for moments, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, optimizers = build(make_config(f"train.optimizer={kind}", f"train.moments={moments}"))
        set_gradients(model)
        optimizers.step(0.01)
        kept = {name: value for name, value in optimizers.state_tensors().items() if not name.endswith("/step")}
        assert {value.dtype for value in kept.values()} == {dtype}
        sizes[moments] = sum(value.nbytes for value in kept.values())
    assert sizes["bf16"] * 2 == sizes["fp32"] > 0


def test_sharded_parameters_have_sharded_moments() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.nn.Parameter(noise((6, 4), 0))
        parts = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        optimizer = Bf16AdamW([{"params": [whole, parts]}], lr=0.1, betas=(0.9, 0.95))
        for step in range(3):
            whole.grad = noise((6, 4), 1 + step)
            parts.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            optimizer.step()
        assert torch.equal(parts.full_tensor(), whole)  # type: ignore[attr-defined]
        assert torch.equal(optimizer.state[parts]["exp_avg"].full_tensor(), optimizer.state[whole]["exp_avg"])
    finally:
        dist.destroy_process_group()


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


def test_muon_with_momentum_in_bf16_is_its_own_with_momentum_rounded() -> None:
    ours, theirs = (torch.nn.Parameter(noise((8, 12), 0)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1, "dtype": torch.float32}
    first = Muon([{"params": [ours]}], moments=torch.bfloat16, **settings)  # type: ignore[arg-type]
    second = Muon([{"params": [theirs]}], **settings)  # type: ignore[arg-type]
    for step in range(5):
        ours.grad = theirs.grad = noise((8, 12), 1 + step)
        first.step()
        second.step()
        second.state[theirs]["momentum"].copy_(second.state[theirs]["momentum"].bfloat16())
    assert torch.equal(ours, theirs)
    assert torch.equal(first.state[ours]["momentum"].float(), second.state[theirs]["momentum"])


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_back_exactly(make_config: Callable[..., Config], kind: str, moments: str) -> None:
    config = make_config(f"train.optimizer={kind}", f"train.moments={moments}")
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
