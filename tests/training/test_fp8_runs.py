"""Runs in FP8: they learn, resume to the last bit, cut batches and recompute blocks, and name wrong settings."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moestro.config import Config, build_config
from moestro.data.batches import Batch
from moestro.errors import ConfigError
from moestro.model.layers import Linear
from moestro.model.transformer import Transformer
from moestro.ops.precision import Fp8Recipe
from moestro.training import loop
from moestro.training.checkpoint import latest_checkpoint
from moestro.training.loop import train
from moestro.training.metrics import read_metrics
from moestro.training.precision import precision_from, resolve_precision
from moestro.training.prepare import build_model
from moestro.training.step import train_step

Make = Callable[..., Config]
FP8 = "train.precision=fp8"


@pytest.fixture(scope="module")
def fp8_run(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps; not to be changed."""
    run = tmp_path_factory.mktemp("fp8") / "run"
    train(make_config(FP8), run, quiet=True)
    return run


def test_a_run_learns(fp8_run: Path) -> None:
    losses = [record["loss_main"] for record in read_metrics(fp8_run)]
    assert losses[-1] < losses[0] - 0.5
    path = latest_checkpoint(fp8_run)
    assert path is not None
    assert {t.dtype for t in load_file(path / "model.safetensors").values()} == {torch.float32}  # master weights


def test_a_killed_run_resumes_to_the_same_bits(
    make_config: Make, fp8_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = 0, train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        assert train(make_config(FP8), tmp_path / "run", quiet=True).step == 7
    train(make_config(FP8), tmp_path / "run", resume=True, quiet=True)
    weights = []
    for run in (tmp_path / "run", fp8_run):
        path = latest_checkpoint(run)
        assert path is not None
        weights.append(
            load_file(path / "model.safetensors") | load_file(path / "train_state" / "optimizer.safetensors")
        )
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


@pytest.mark.parametrize(
    "override", ["train.precision=bf16", "fp8.transpose=both", "fp8.scale=ue8m0", "fp8.tile=tensor"]
)
def test_a_resumed_run_keeps_its_precision(make_config: Make, fp8_run: Path, override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"was started with another (train\.precision|fp8\.\w+) \('\w+', not '\w+'\)$"
    ):
        train(make_config(FP8, override), fp8_run, resume=True, quiet=True)


def one_step(config: Config, *, parts: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and parameters after one step on a batch that is cut into parts."""
    model, optimizers = build_model(config)
    rows, length = 4, 33
    tokens = torch.arange(rows * length).view(rows, length) * 7 % config.model.vocab_size
    batches = [Batch(t, torch.zeros_like(t)) for t in tokens.split(rows // parts)]
    result = train_step(
        model,
        optimizers,
        batches,
        config.train,
        token_bytes=torch.ones(config.model.vocab_size, dtype=torch.int64),
        lr=1e-3,
        mtp_weight=0.3,
        bias_speed=1e-3,
    )
    return result.loss, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_recomputed_blocks_give_the_same_bits(make_config: Make) -> None:
    kept, again = one_step(make_config(FP8)), one_step(make_config(FP8, "train.recompute=true"))
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][name], tensor) for name, tensor in again[1].items())


def test_a_cut_batch_gives_nearly_the_same_loss(make_config: Make) -> None:
    """Tiles along tokens begin with each part, so gradients differ by roundings."""
    whole, cut = one_step(make_config(FP8)), one_step(make_config(FP8), parts=2)
    assert cut[0] == pytest.approx(whole[0], rel=1e-4)


def test_head_router_norms_and_mtp_projections_stay_out_of_fp8(make_config: Make) -> None:
    with torch.device("meta"):
        model = Transformer(make_config("model.q_lora_rank=8").model, Fp8Recipe())
    found = {name: module.precision for name, module in model.named_modules() if isinstance(module, Linear)}
    plain = {name for name, precision in found.items() if precision == "bf16"}
    assert plain == {"head", "mtp.0.project"}
    wide = {
        name for name, precision in found.items() if isinstance(precision, Fp8Recipe) and precision.inputs == "e5m6"
    }
    assert wide == {f"{block}.attention.out" for block in ("layers.0", "layers.1", "mtp.0.block")}
    assert all(isinstance(p, Fp8Recipe) for name, p in found.items() if name not in plain)


def test_settings_become_a_recipe(make_config: Make) -> None:
    config = make_config(FP8, "fp8.scale=ue8m0", "fp8.accumulate=hopper", "fp8.promote=64", "fp8.dgrad_tile=square")
    assert resolve_precision(config) == "fp8"
    assert precision_from(config) == Fp8Recipe("ue8m0", "requantize", "hopper", 64, "block", "square")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=fp4"], r"train\.precision: .*fp8"),
        (["fp8.scale=fp16"], r"fp8\.scale: "),
        (["fp8.promote=48"], r"fp8\.promote: "),
        (["fp8.promote=256"], r"fp8: promote=256 exceeds the 128 values that share a scale"),
        (["fp8.size=128"], r"unknown key 'fp8\.size'"),
        (["train.dtype=bf16"], r"train: dtype is the old name of precision: give one of them"),
    ],
)
def test_wrong_settings_are_named_in_one_line(make_config: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_config(*overrides)
    assert "\n" not in str(caught.value)


def test_the_old_name_of_the_precision_is_read(fp8_run: Path) -> None:
    assert build_config({"train": {"dtype": "bf16"}}).train.precision == "bf16"
    tree = json.loads((fp8_run / "settings.json").read_text())
    del tree["fp8"]
    tree["train"]["dtype"] = tree["train"].pop("precision")
    assert build_config(tree) == build_config(json.loads((fp8_run / "settings.json").read_text()))
