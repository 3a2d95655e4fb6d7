"""Routing schemes in training steps: what a cut batch may change, noise from its seed alone, room, checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import BalanceTerm, Config, build_config, load_preset, preset_names
from moestro.data.batches import Batch
from moestro.data.tokenizer import Tokenizer
from moestro.errors import ConfigError
from moestro.model.transformer import Transformer, init_weights
from moestro.routing.balance import balance_loss
from moestro.routing.router import Routes
from moestro.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from moestro.training.loss import Counts, attention_batch, compute_loss, tokens_ahead
from moestro.training.optim import Optimizers
from moestro.training.step import StepResult, train_step

Make = Callable[..., Config]
SCHEMES = preset_names("presets/routers")
RANDOM = ["shazeer", "switch", "gshard", "deepseek-v2"]  # schemes that draw numbers in training
GROUPED = ("model.num_groups=4", "model.top_k_groups=2", 'model.router.group_score="max"')
TOKEN_BYTES = torch.ones(300, dtype=torch.int64)


def sample_batch(rows: int = 8, *, padded: bool = True, seed: int = 5) -> Batch:
    """Random tokens in documents of random lengths; one row may have padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 300, (rows, 33), generator=generator)
    starts = torch.rand(rows, 33, generator=generator) < 0.15
    starts[:, 0] = False
    segments = starts.cumsum(1)
    if padded:
        segments[-1, 20:] = -1
    return Batch(tokens, segments)


def cut(batch: Batch, rows: int) -> list[Batch]:
    return [Batch(t, s) for t, s in zip(batch.tokens.split(rows), batch.segments.split(rows), strict=True)]


def build(config: Config) -> tuple[Transformer, Optimizers]:
    model = Transformer(config.model)
    init_weights(model, 0)
    return model, Optimizers(model, config.train)


def scheme(make_config: Make, name: str, **train: Any) -> Config:
    """The tiny configuration with 24 experts, three layers and a preset's routing."""
    tree = make_config().model_dump(mode="json")
    tree["model"] |= {"num_experts": 24, "num_layers": 3, "expert_dim": 8}
    tree["model"] |= load_preset(name, "presets/routers")["model"]
    tree["train"] |= train
    return build_config(tree)


def run_step(
    model: Transformer, optimizers: Optimizers, batches: list[Batch], config: Config, noise_seed: int = 0
) -> StepResult:
    return train_step(
        model, optimizers, batches, config.train,
        token_bytes=TOKEN_BYTES, lr=1e-3, mtp_weight=0.3, bias_speed=0.01, noise_seed=noise_seed,
    )  # fmt: skip


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_term(kind: str, over: str, weight: float = 0.5) -> list[str]:
    noise = ['model.router.noise="learned"'] if kind == "load" else []
    return [*GROUPED, *noise, f'model.router.balance=[{{kind="{kind}", weight={weight}, over="{over}"}}]']


@pytest.mark.parametrize("kind", ["expert", "device", "communication", "first_choice", "importance", "load"])
def test_losses_over_a_batch_refuse_to_be_cut(make_config: Make, kind: str) -> None:
    overrides = with_term(kind, "batch")
    assert make_config(*overrides).model.router.balance[0].needs_whole_batch
    with pytest.raises(ConfigError, match=f"'{kind}'.*train.accumulate=4") as caught:
        make_config(*overrides, "train.accumulate=4")
    assert "\n" not in str(caught.value)
    make_config(*overrides, "train.accumulate=4", "model.num_experts=0")  # no router, no loss


@pytest.mark.parametrize("kind", ["first_choice", "importance", "load"])
def test_losses_that_know_no_sequences_stay_over_the_batch(make_config: Make, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}'"):
        make_config(*with_term(kind, "sequence"), "train.accumulate=4")


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("sequence", "batch"),
        ("z", "batch"),
        ("expert", "sequence"),
        ("device", "sequence"),
        ("communication", "sequence"),
    ],
)
def test_losses_of_sequences_and_tokens_are_the_same_however_a_batch_is_cut(
    make_config: Make, kind: str, over: str
) -> None:
    config, batch = make_config(*with_term(kind, over), "train.accumulate=4"), sample_batch()
    whole, parts = build(config), build(config)
    one, four = run_step(*whole, [batch], config), run_step(*parts, cut(batch, 2), config)
    for name in ("loss", "main", "mtp", "balance", "grad_norm", "nll"):
        assert getattr(one, name) == pytest.approx(getattr(four, name), rel=1e-5), name
    assert torch.equal(one.loads, four.loads) and one.balance > 0
    ours, theirs = gradients(whole[0]), gradients(parts[0])
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-10)


def test_balance_gradients_reach_the_routers(make_config: Make) -> None:
    """The test above could not tell if the weight were lost."""
    found = []
    for weight in (0.0, 0.5):
        config = make_config(*with_term("z", "batch", weight))
        model, optimizers = build(config)
        run_step(model, optimizers, [sample_batch()], config)
        found.append(gradients(model))
    for name in found[0]:
        if "router.weight" in name:
            assert float((found[0][name] - found[1][name]).abs().max()) > 1e-3 * float(found[1][name].abs().max()), name


def mean_loss(term: BalanceTerm, routes: Routes, valid: Tensor, config: Config) -> float:
    """Over the tokens of a router, or over the four sequences."""
    if term.kind == "z":
        assert routes.logits is not None
        sums = [math.log(sum(map(math.exp, row))) ** 2 for row in routes.logits[valid].tolist()]
        return sum(sums) / len(sums)
    loss = float(balance_loss(term, routes, config.model, valid, 4))
    return loss / 4 if term.kind == "sequence" or term.over == "sequence" else loss


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("kind", "over"), [("sequence", "batch"), ("expert", "batch"), ("expert", "sequence"), ("z", "batch")]
)
def test_a_step_adds_up_the_means_over_all_routers(make_config: Make, kind: Any, over: Any, depth: int) -> None:
    """Those of MTP included, whose tokens are the ones that have a target."""
    config = make_config(*with_term(kind, over, 0.25), f"model.mtp_depth={depth}", "model.num_dense_layers=0")
    model, _ = build(config)
    batch, term = sample_batch(4), BalanceTerm(kind=kind, weight=1.0, over=over)
    attention = attention_batch(batch, mask_documents=True)
    with torch.no_grad():
        result = compute_loss(model, batch, Counts.of([batch], depth), mtp_weight=0.3)
        output = model(batch.inputs.flatten(), attention, ahead=[tokens_ahead(batch, 1)][:depth])
    present, targets = (batch.segments[:, :-1] >= 0).flatten(), (batch.targets(1) >= 0).flatten()
    losses = [mean_loss(term, routes, present, config) for routes in output.routes]
    losses += [mean_loss(term, routes, targets, config) for further in output.ahead for routes in further.routes]
    assert len(losses) == 2 + depth
    assert float(result.terms.balance) == pytest.approx(0.25 * sum(losses), rel=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_preset_trains(make_config: Make, name: str) -> None:
    config = scheme(make_config, name)
    model, optimizers = build(config)
    overflow, idle = 0, set(model.state_dict())
    for step in range(2):
        before = copy.deepcopy(model.state_dict())
        result = run_step(model, optimizers, [sample_batch(4, seed=step)], config, step)
        assert result.applied and math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        assert (result.balance > 0) == bool(config.model.router.balance)
        assert result.loads.shape == (config.model.num_moe_layers, config.model.num_experts)
        overflow += result.overflow
        idle -= {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert (overflow > 0) == (config.model.router.capacity.factor > 0)
    without = config.model.router.bias == "none"
    assert idle == {key for key in model.state_dict() if key.endswith("router.bias") and without}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("recompute", [False, True])
def test_noise_comes_from_its_seed_alone(make_config: Make, name: str, recompute: bool) -> None:
    """Equal seeds give equal results to the last bit, whatever was drawn before and however blocks are computed."""
    batch = sample_batch()
    states: dict[str, tuple[list[float], list[int], dict[str, Tensor]]] = {}
    for run, seed in (("first", 3), ("again", 3), ("other", 4)):
        torch.manual_seed(len(states))
        config = scheme(make_config, name, recompute=recompute and run == "again")
        model, optimizers = build(config)
        results = [run_step(model, optimizers, [batch], config, seed + 10 * step) for step in range(2)]
        states[run] = ([r.loss for r in results], [r.overflow for r in results], model.state_dict())
    assert states["first"][:2] == states["again"][:2]
    assert all(torch.equal(value, states["again"][2][key]) for key, value in states["first"][2].items())
    assert states["first"][0] != states["other"][0]


def test_schemes_without_noise_do_not_depend_on_the_seed(make_config: Make) -> None:
    losses = []
    for seed in (1, 2):
        config = scheme(make_config, "st-moe")
        losses.append(run_step(*build(config), [sample_batch()], config, seed).loss)
    assert losses[0] == losses[1]


def test_micro_batches_have_noise_of_their_own(make_config: Make) -> None:
    """The same rows twice in a step: if the generator were set again for each, both halves would be alike."""
    config = make_config('model.router.noise="learned"', "train.accumulate=2")
    model, _ = build(config)
    batch = sample_batch(2)
    seen: list[Tensor] = []
    for _, router in model.routers():
        router.register_forward_hook(lambda module, args, routes: seen.append(routes.noisy.detach()))
    run_step(model, Optimizers(model, config.train), [batch, batch], config)
    half = len(seen) // 2
    assert half == 2 and not torch.equal(seen[0], seen[half])


@pytest.mark.parametrize("factor", [0.4, 1.0, 8.0])
def test_overflow_is_what_loads_exceed_room_by(make_config: Make, factor: float) -> None:
    """Loads count choices whether or not there was room for them."""
    config = make_config(f"model.router.capacity={{factor={factor}}}", "model.mtp_depth=0", "model.num_dense_layers=0")
    batches = cut(sample_batch(padded=False), 4)
    room = math.ceil(factor * 4 * 32 * 2 / 8)
    expected, loads = 0, torch.zeros(2, 8, dtype=torch.int64)
    model, optimizers = build(config)
    for batch in batches:
        with torch.no_grad():
            result = compute_loss(model, batch, Counts.of([batch], 0), mtp_weight=0.0)
        assert int(result.loads.sum()) == 2 * 4 * 32 * 2
        expected += sum(max(load - room, 0) for row in result.loads.tolist() for load in row)
        loads += result.loads
    step = run_step(model, optimizers, batches, config)
    assert step.overflow == expected and torch.equal(step.loads, loads)
    assert (expected == 0) == (factor == 8.0)


@pytest.mark.parametrize("rule", ["sign", "error", "multiplicative"])
def test_every_bias_rule_moves_by_its_formula(make_config: Make, rule: str) -> None:
    config = make_config(f'model.router.bias="{rule}"', "model.num_dense_layers=0")
    model, optimizers = build(config)
    expected = [[0.0] * 8 for _ in model.routers()]
    for seed in (1, 2):
        result = run_step(model, optimizers, cut(sample_batch(seed=seed), 4), config)
        for bias, loads in zip(expected, result.loads.tolist(), strict=True):
            mean = sum(loads) / 8
            for i, load in enumerate(loads):
                error = mean - load
                bias[i] += 0.01 * (error / mean if rule == "error" else (error > 0) - (error < 0))
    for (_, router), bias in zip(model.routers(), expected, strict=True):
        assert router.bias.tolist() == pytest.approx(bias, abs=1e-7)


def test_a_scheme_of_our_own_resumes_from_its_checkpoint(
    make_config: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Noise matrices and their moments included: two steps, or one, a checkpoint and one more, are the same."""
    config = scheme(make_config, "shazeer")
    batches = [sample_batch(seed=step) for step in range(2)]
    straight, interrupted, resumed = build(config), build(config), build(config)
    for step, batch in enumerate(batches):
        last = run_step(*straight, [batch], config, step)
    run_step(*interrupted, [batches[0]], config, 0)
    state = TrainState(step=1, total_steps=2, tokens=256, seconds=1.0, skipped=0, pack={})
    directory = save_checkpoint(tmp_path, interrupted[0], tokenizer, interrupted[1], state, keep=1)
    assert load_checkpoint(directory, *resumed) == state
    again = run_step(*resumed, [batches[1]], config, 1)
    assert (again.loss, again.grad_norm, again.balance) == (last.loss, last.grad_norm, last.balance)
    ours, theirs = straight[0].state_dict(), resumed[0].state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert any(key.endswith("router.noise") and bool(value.any()) for key, value in ours.items())
