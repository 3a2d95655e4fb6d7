"""What FP8 does to numbers, against a brute force value by value; and measuring changes nothing."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moestro.config import Config
from moestro.data.batches import Batch
from moestro.ops.precision import Fp8Recipe, after_attention
from moestro.ops.training import reference_fp8 as spec
from moestro.training import loop
from moestro.training.checkpoint import latest_checkpoint
from moestro.training.fp8_stats import KINDS, Quantised, Stats, choose_rows, measure_experts, measure_fp8
from moestro.training.loop import Loop, train
from moestro.training.loss import Counts, compute_loss
from moestro.training.metrics import read_evals, read_fp8, read_metrics
from moestro.training.prepare import build_model

Make = Callable[..., Config]
FP8 = "train.precision=fp8"
ROWS, SQUARES = (1, 128), (128, 128)


def magnitudes(fraction_bits: int, bias: int, largest: float) -> list[float]:
    """Every magnitude of a format in order, so that an even place means an even code."""
    steps = 2**fraction_bits
    found = [f / steps * 2.0 ** (1 - bias) for f in range(steps)]
    exponent = 1
    while found[-1] < largest:
        found += [(1 + f / steps) * 2.0 ** (exponent - bias) for f in range(steps)]
        exponent += 1
    return [value for value in found if value <= largest]


E4M3 = magnitudes(3, 7, 448.0)
E5M6 = magnitudes(6, 15, 65024.0)


def nearest(value: float, table: list[float]) -> float:
    above = min(bisect.bisect_left(table, abs(value)), len(table) - 1)
    below = max(above - 1, 0)
    distances = abs(abs(value) - table[below]), abs(table[above] - abs(value))
    take_above = distances[1] < distances[0] or (distances[1] == distances[0] and above % 2 == 0)
    return math.copysign(table[above if take_above else below], value)


def brute_force(x: Tensor, block: tuple[int, int], power: bool = False, table: list[float] = E4M3) -> Stats:
    """The numbers of x [N, K], one value at a time."""
    values, changes, zeros, top, scales = [], [], 0, 0, []
    array = x.detach().float().numpy()
    for r in range(0, array.shape[0], block[0]):
        for c in range(0, array.shape[1], block[1]):
            part = array[r : r + block[0], c : c + block[1]]
            scale = np.float32(np.abs(part).max()) / np.float32(table[-1])
            if not scale:
                continue
            scale = np.float32(2.0 ** math.ceil(math.log2(scale))) if power else scale
            scales.append(float(scale))
            for value in part[part != 0]:
                code = nearest(float(value / scale), table)
                values.append(float(value))
                changes.append(code * float(scale) - float(value))
                zeros += code == 0
                top += abs(code) == table[-1]
    count, error = len(values), math.sqrt(sum(d * d for d in changes) / sum(v * v for v in values))
    return {"error": error, "zeros": zeros / count, "top": top / count, "low": min(scales), "high": max(scales)}


def assert_same(found: Stats, expected: Stats, rel: float = 1e-6) -> None:
    assert found == pytest.approx(expected, rel=rel)


def wild(*shape: int) -> Tensor:
    """Values of many sizes: some become 0, one block is 0, some values are 0, some lie between two codes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.logspace(-9, 3, shape[-1])
    x[..., ::7] = 0
    x[0, :128] = 0
    x[1, :3] = torch.tensor([448.0, 17.0, 19.0])  # ties, if the scale is 1
    x[1, 3:128] = 0
    return x


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_numbers_are_those_of_brute_force(scale: str) -> None:
    recipe, power = Fp8Recipe(scale=scale), scale == "ue8m0"  # type: ignore[arg-type]
    x, w = wild(5, 300).to(torch.bfloat16), wild(130, 140)
    assert_same(Quantised.inputs(x, recipe).stats(), brute_force(x, ROWS, power))
    assert_same(Quantised.gradients(x, recipe).stats(), brute_force(x, ROWS, power))
    assert_same(Quantised.weights(w, recipe).stats(), brute_force(w, SQUARES, power))
    assert 0 < brute_force(x, ROWS)["zeros"] < 0.9


def test_other_recipes_have_their_own_blocks_and_codes() -> None:
    x = wild(5, 300).to(torch.bfloat16)
    recipe = Fp8Recipe(dgrad_tile="square", tile="tensor")
    assert_same(Quantised.gradients(x, recipe).stats(), brute_force(x, (5, 300)))
    assert_same(Quantised.gradients(x, replace(recipe, tile="block")).stats(), brute_force(x, SQUARES))
    wide = Quantised.inputs(x, after_attention(Fp8Recipe())).stats()
    assert_same(wide, brute_force(x, ROWS, True, E5M6))


def test_only_zeros_have_no_numbers() -> None:
    assert all(math.isnan(value) for value in Quantised.inputs(torch.zeros(2, 3), Fp8Recipe()).stats().values())


def tokens_of(config: Config, rows: int = 2, length: int = 17) -> Batch:
    tokens = torch.arange(rows * length).view(rows, length) * 7 % config.model.vocab_size
    return Batch(tokens, torch.zeros_like(tokens))


def test_a_model_is_measured_layer_by_layer(make_config: Make) -> None:
    """Linear layers against other hooks; the names of all matrices."""
    config = make_config(FP8)
    model, batch = build_model(config)[0], tokens_of(config)
    layers = measure_fp8(model, batch, mtp_weight=0.3, share=0.25)
    attention = {f"attention.{name}" for name in ("q", "kv_down", "kv_up", "out")}
    dense = attention | {"ffn.gate_up", "ffn.down"}
    sparse = attention | {f"ffn.{part}.{name}" for part in ("experts", "shared") for name in ("gate_up", "down")}
    assert {name: set(matrices) for name, matrices in layers.items()} == {"0": dense, "1": sparse, "mtp.0": sparse}
    assert all(tuple(kinds) == KINDS for matrices in layers.values() for kinds in matrices.values())

    seen: dict[str, Tensor] = {}
    module = model.layers[1].attention.kv_down  # type: ignore[union-attr]
    module.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[0]))
    module.register_full_backward_hook(lambda _, __, outputs: seen.update(gradients=outputs[0]))
    result = compute_loss(model, batch, Counts.of([batch], 1), mtp_weight=0.3)
    (result.terms.total * 0.25).backward()
    found = layers["1"]["attention.kv_down"]
    assert_same(found["weights"], brute_force(module.weight, SQUARES))
    assert_same(found["inputs"], brute_force(seen["inputs"], ROWS))
    assert_same(found["gradients"], brute_force(seen["gradients"], ROWS))


@pytest.mark.parametrize("dgrad_tile", ["row", "square"])
def test_experts_are_measured_together(dgrad_tile: str) -> None:
    """Against the specification, expert by expert; what lies between the two matrices included."""
    recipe = Fp8Recipe(dgrad_tile=dgrad_tile)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(3, 24, 40, generator=generator), torch.randn(3, 40, 12, generator=generator)
    x, d_out = torch.randn(2, 30, 40, generator=generator).to(torch.bfloat16)
    ids, weights = torch.arange(60).view(30, 2) % 4, torch.rand(30, 2, generator=generator)  # expert 3: no room
    found = measure_experts(x, d_out, (gate_up, down), ids, weights, recipe)

    acts, gradients, d_outs = [], [], []
    for expert in range(3):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        h = spec.linear(x[token], gate_up[expert], recipe)
        acts.append(spec.swiglu(h, weights[token, slot]).to(x.dtype))
        d_outs.append(d_out[token])
        d_act = spec.multiply_back(*spec.quantize_gradient(d_out[token], recipe), down[expert], recipe)
        kept = spec.read_back(*spec.quantize(h, ROWS, recipe))
        gradients.append(spec.swiglu_gradients(d_act, kept, weights[token, slot])[1].to(x.dtype))
    assert_same(found["gate_up"]["inputs"], brute_force(x, ROWS))
    assert_same(found["down"]["inputs"], brute_force(torch.cat(acts), ROWS), rel=1e-3)
    for name, parts in (("gate_up", gradients), ("down", d_outs)):
        if dgrad_tile == "row":
            assert_same(found[name]["gradients"], brute_force(torch.cat(parts), ROWS), rel=1e-3)
        else:
            each = [brute_force(part, SQUARES) for part in parts]
            ends = min(one["low"] for one in each), max(one["high"] for one in each)
            assert (found[name]["gradients"]["low"], found[name]["gradients"]["high"]) == pytest.approx(ends)
    for name, stack in (("gate_up", gate_up), ("down", down)):
        each = [brute_force(matrix, SQUARES) for matrix in stack]
        assert found[name]["weights"]["high"] == pytest.approx(max(one["high"] for one in each))
        assert found[name]["weights"]["zeros"] == pytest.approx(np.mean([one["zeros"] for one in each]))


def test_measuring_touches_neither_gradients_nor_random_state(make_config: Make) -> None:
    config = make_config(FP8)
    model = build_model(config)[0]
    marks = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = marks[name].clone()
    before, state = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    first = measure_fp8(model, tokens_of(config), mtp_weight=0.3)
    assert measure_fp8(model, tokens_of(config), mtp_weight=0.3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, marks[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_come_from_all_domains_in_turn() -> None:
    def batches(first: int, rows: int) -> Callable[[], Iterator[Batch]]:
        tokens = torch.arange(first, first + rows)[:, None].expand(rows, 5)
        return lambda: iter([Batch(tokens, torch.zeros_like(tokens))])

    domains = {"a": batches(0, 3), "empty": lambda: iter([]), "b": batches(10, 1)}
    batch = choose_rows(domains, 12)
    assert batch is not None and batch.tokens[:, 0].tolist() == [0, 10, 1]
    long = choose_rows(domains, 3)
    assert long is not None and long.tokens.shape == long.segments.shape == (1, 4)
    assert choose_rows({"empty": lambda: iter([])}) is None


@pytest.fixture(scope="module")
def measured_run(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps, evaluated twice; not to be changed."""
    run = tmp_path_factory.mktemp("measured") / "run"
    train(make_config(FP8), run, quiet=True)
    return run


def weights_of(run: Path) -> dict[str, Tensor]:
    path = latest_checkpoint(run)
    assert path is not None
    return load_file(path / "model.safetensors") | load_file(path / "train_state" / "optimizer.safetensors")


def test_a_run_that_is_not_measured_is_the_same_run(
    make_config: Make, measured_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "measure_fp8", lambda self: None)
    train(make_config(FP8), tmp_path / "run", quiet=True)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(measured_run)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[record["loss"] for record in read_metrics(run)] for run in (tmp_path / "run", measured_run)]
    assert losses[0] == losses[1]
    assert not (tmp_path / "run" / "fp8.jsonl").exists()


def test_every_evaluation_of_an_fp8_run_is_measured(measured_run: Path, tiny_run: Path) -> None:
    records = read_fp8(measured_run)
    assert [record["step"] for record in records] == [record["step"] for record in read_evals(measured_run)] == [6, 12]
    assert [record["tokens"] for record in records] == [6 * 4 * 32, 12 * 4 * 32]
    assert 0.02 < records[1]["layers"]["1"]["attention.q"]["weights"]["error"] < 0.04
    assert read_fp8(tiny_run) == [] and not (tiny_run / "fp8.jsonl").exists()


def test_a_resumed_run_measures_the_same_and_nothing_twice(
    make_config: Make, measured_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 8, after the evaluation at step 6 but with no checkpoint since step 5."""
    run, original, calls = tmp_path / "run", loop.train_step, iter(range(1, 99))

    def step(*args: object, **kwargs: object) -> object:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return original(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(FP8), run, quiet=True)
    assert [record["step"] for record in read_fp8(run)] == [6]
    train(make_config(FP8), run, resume=True, quiet=True)
    assert (run / "fp8.jsonl").read_bytes() == (measured_run / "fp8.jsonl").read_bytes()
