"""One training step: independent of how the batch is cut and of recompute; MTP against a plain formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from moestro.config import Config
from moestro.data.batches import Batch
from moestro.model.attention import AttentionBatch, Context
from moestro.model.rope import rope_tables
from moestro.model.transformer import MTPModule, Transformer, init_weights
from moestro.training.loss import Counts, attention_batch, compute_loss
from moestro.training.optim import Optimizers
from moestro.training.step import StepResult, train_step

Make = Callable[..., Config]
TOKEN_BYTES = torch.ones(300, dtype=torch.int64)


def sample_batch(rows: int = 8, length: int = 33) -> Batch:
    """Random tokens in documents of random lengths, one row with padding."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 300, (rows, length), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 0.15
    starts[:, 0] = False
    segments = starts.cumsum(1)
    segments[-1, 20:] = -1
    return Batch(tokens, segments)


def build(config: Config) -> tuple[Transformer, Optimizers]:
    model = Transformer(config.model)
    init_weights(model, 0)
    return model, Optimizers(model, config.train)


def run_step(
    model: Transformer, optimizers: Optimizers, batches: list[Batch], config: Config, **changes: Any
) -> StepResult:
    settings = {"lr": 1e-3, "mtp_weight": 0.3, "bias_speed": 0.01} | changes
    return train_step(model, optimizers, batches, config.train, token_bytes=TOKEN_BYTES, **settings)


def cut(batch: Batch, rows: int) -> list[Batch]:
    return [Batch(t, s) for t, s in zip(batch.tokens.split(rows), batch.segments.split(rows), strict=True)]


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_accumulation_changes_nothing(make_config: Make) -> None:
    config, batch = make_config("model.mtp_depth=2"), sample_batch()
    whole, parts = build(config), build(config)
    one, four = run_step(*whole, [batch], config), run_step(*parts, cut(batch, 2), config)
    for name in ("loss", "main", "mtp", "balance", "grad_norm", "nll"):
        assert getattr(one, name) == pytest.approx(getattr(four, name), rel=1e-6), name
    assert torch.equal(one.loads, four.loads)
    assert (one.text_bytes, one.agreement) == (four.text_bytes, four.agreement)
    ours, theirs = gradients(whole[0]), gradients(parts[0])
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-10)
    for (name, a), (_, b) in zip(whole[0].named_parameters(), parts[0].named_parameters(), strict=True):
        # AdamW's first update is lr·g/(|g| + eps): a gradient of rounding size may move by up to 2·lr
        far = (a - b).abs() > 1e-6
        assert float(far.float().mean()) < 1e-3, name
    for (name, a), (_, b) in zip(whole[0].routers(), parts[0].routers(), strict=True):
        assert torch.equal(a.bias, b.bias), name


def test_recompute_changes_nothing_at_all(make_config: Make) -> None:
    batch, states = sample_batch(), []
    for recompute in ("false", "true"):
        config = make_config(f"train.recompute={recompute}")
        model, optimizers = build(config)
        result = run_step(model, optimizers, cut(batch, 4), config)
        states.append((result, model.state_dict()))
    (plain, plain_state), (again, again_state) = states
    assert (plain.loss, plain.grad_norm) == (again.loss, again.grad_norm)
    assert torch.equal(plain.loads, again.loads)
    assert all(torch.equal(plain_state[name], again_state[name]) for name in plain_state)


def documents(batch: Batch) -> list[torch.Tensor]:
    """Every document with a target, alone."""
    parts = [row[kept == n] for row, kept in zip(batch.tokens, batch.segments, strict=True) for n in range(64)]
    return [part for part in parts if len(part) > 1]


def hidden_of_depths(model: Transformer, document: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of the main model and of every MTP depth (V3 eq. 21–23), each as long as it has targets."""
    length = len(document) - 1
    hidden = [model(document[:-1], AttentionBatch.causal(1, length)).hidden]
    for k, module in enumerate(model.mtp, start=1):
        assert isinstance(module, MTPModule)
        kept = length - k
        if kept < 1:
            break
        ahead = F.embedding(document[k : k + kept], model.embed.weight)
        halves = [module.embed_norm(ahead), module.hidden_norm(hidden[-1][:kept])]
        x = torch.cat(halves, -1) @ module.project.weight.T
        rope = rope_tables(model.config, torch.arange(kept))
        context = Context(document[k : k + kept], rope, AttentionBatch.causal(1, kept))
        hidden.append(module.norm(module.block(x, context)[0]))
    return hidden


def losses_slowly(model: Transformer, batch: Batch) -> list[float]:
    """Loss of every depth, the main model first: document by document and token by token (V3 eq. 24)."""
    sums, counts = [0.0] * (len(model.mtp) + 1), [0] * (len(model.mtp) + 1)
    for document in documents(batch):
        for depth, hidden in enumerate(hidden_of_depths(model, document)):
            assert model.head is not None
            logits = hidden @ model.head.weight.T
            for row, target in zip(logits, document[depth + 1 :], strict=True):
                sums[depth] -= float(F.log_softmax(row, -1)[target])
                counts[depth] += 1
    return [total / count for total, count in zip(sums, counts, strict=True)]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_losses_equal_documents_alone(make_config: Make, depth: int) -> None:
    """Targets and context never cross documents, at any depth."""
    config = make_config(f"model.mtp_depth={depth}", "model.init_std=0.1")
    model, _ = build(config)
    batch = sample_batch(4)
    with torch.no_grad():
        result = compute_loss(model, batch, Counts.of([batch], depth), mtp_weight=0.3)
        main, *mtp = losses_slowly(model, batch)
    assert float(result.terms.main) == pytest.approx(main, rel=1e-5)
    assert float(result.terms.mtp) == pytest.approx(sum(mtp) / max(depth, 1), rel=1e-5)
    total = main + 0.3 * sum(mtp) / max(depth, 1) + float(result.terms.balance)
    assert float(result.terms.total) == pytest.approx(total, rel=1e-5)
    inputs = int((batch.segments[:, :-1] >= 0).sum())
    assert result.loads.shape == (1 + depth, 8)
    assert int(result.loads[0].sum()) == inputs * config.model.top_k
    for k in range(1, depth + 1):
        assert int(result.loads[k].sum()) == int((batch.targets(k) >= 0).sum()) * config.model.top_k


def test_biases_follow_the_loads_mtp_included(make_config: Make) -> None:
    config = make_config("model.mtp_depth=2", "model.num_dense_layers=0")
    model, optimizers = build(config)
    result = run_step(model, optimizers, cut(sample_batch(), 4), config)
    assert [name for name, _ in model.routers()] == ["0", "1", "mtp.0", "mtp.1"]
    for (_, router), loads in zip(model.routers(), result.loads.tolist(), strict=True):
        mean = sum(loads) / len(loads)
        expected = [0.01 * ((mean > load) - (mean < load)) for load in loads]
        assert router.bias.tolist() == pytest.approx(expected)
        assert any(router.bias.tolist())


@pytest.mark.parametrize(("overrides", "speed"), [([], 0.0), (['model.router.bias="none"'], 0.01)])
def test_biases_stand_still_when_told_to(make_config: Make, overrides: list[str], speed: float) -> None:
    config = make_config(*overrides)
    model, optimizers = build(config)
    run_step(model, optimizers, [sample_batch()], config, bias_speed=speed)
    assert not any(bool(router.bias.any()) for _, router in model.routers())


def test_a_gradient_that_is_not_finite_is_thrown_away(make_config: Make) -> None:
    config = make_config()
    model, optimizers = build(config)
    run_step(model, optimizers, [sample_batch()], config)
    before = copy.deepcopy(model.state_dict())
    state = {name: value.clone() for name, value in optimizers.state_tensors().items()}
    hook = model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    result = run_step(model, optimizers, [sample_batch()], config)
    assert not result.applied
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(state[name], value) for name, value in optimizers.state_tensors().items())
    hook.remove()
    assert run_step(model, optimizers, [sample_batch()], config).applied


@pytest.mark.parametrize("attention", ["mla", "mha", "gqa", "mqa"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_attention_and_optimizer_learns(make_config: Make, attention: str, optimizer: str) -> None:
    config = make_config(f"model.attention={attention}", f"train.optimizer={optimizer}", "model.num_kv_heads=1")
    model, optimizers = build(config)
    losses = [run_step(model, optimizers, [sample_batch(4)], config, lr=5e-3).main for _ in range(8)]
    assert losses[-1] < losses[0] - 0.3


def test_dense_models_have_no_loads(make_config: Make) -> None:
    config = make_config("model.num_experts=0", "model.mtp_depth=1")
    result = run_step(*build(config), [sample_batch()], config)
    assert result.loads.numel() == 0 and result.balance == 0.0 and result.applied


def test_a_whole_step_runs_on_the_meta_device(make_config: Make) -> None:
    """Shapes alone: nothing is made elsewhere and nothing is read back."""
    config = make_config("model.mtp_depth=1", "train.recompute=true")
    with torch.device("meta"):
        model = Transformer(config.model, "bf16")
    result = run_step(model, Optimizers(model, config.train), cut(sample_batch(), 4), config)
    assert result.applied and result.loads.shape == (len(model.routers()), config.model.num_experts)
    assert result.loads.is_meta and {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_runs_on_fake_tensors(make_config: Make, precision: Any) -> None:
    config, batch = make_config("model.mtp_depth=1"), sample_batch()
    counts, attention = Counts.of([batch], 1), attention_batch(batch, mask_documents=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Transformer(config.model, precision)
        optimizers = Optimizers(model, config.train)
        result = compute_loss(model, batch, counts, mtp_weight=0.3, attention=attention)
        result.terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1e-3)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert result.loads.shape == (len(model.routers()), config.model.num_experts)


def test_a_step_leaves_torchs_generator_alone(make_config: Make) -> None:
    """Noise of routers is drawn from streams of their own, the same again where blocks are recomputed."""
    noisy = ("model.router.noise=jitter", "model.router.score=softmax")
    results = []
    for recompute, seed in (("false", 1), ("true", 1), ("false", 2)):
        config = make_config(*noisy, f"train.recompute={recompute}")
        model, optimizers = build(config)
        state = torch.random.get_rng_state()
        results.append(run_step(model, optimizers, [sample_batch()], config, noise_seed=seed))
        assert torch.equal(state, torch.random.get_rng_state())
    assert results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm
    assert results[0].loss != results[2].loss


def test_weights_of_targets_multiply_their_loss(make_config: Make) -> None:
    """Weight 0 is no target; the sum is divided by the number of targets, whatever they weigh."""
    config, batch = make_config("model.mtp_depth=1"), sample_batch()
    model, _ = build(config)
    plain = compute_loss(model, batch, Counts.of([batch], 1), mtp_weight=0.3)
    ones = replace(batch, weights=torch.ones(batch.tokens.shape))
    assert torch.equal(compute_loss(model, ones, Counts.of([ones], 1), mtp_weight=0.3).terms.total, plain.terms.total)
    weights = torch.linspace(-1, 2, batch.tokens.numel()).view(batch.tokens.shape)
    weights[:, ::3] = 0
    some = replace(batch, weights=weights)
    counts = Counts.of([some], 1)
    found = compute_loss(model, some, counts, mtp_weight=0.3)
    valid = (batch.targets(0) >= 0) & (weights[:, 1:] != 0)
    assert counts.targets[0] == int(valid.sum())
    expected = (plain.nll.view(valid.shape) * weights[:, 1:] * valid).sum() / valid.sum()
    torch.testing.assert_close(found.terms.main, expected, rtol=1e-4, atol=1e-5)
