"""Checkpoints saved in FP8 or bf16: a model as published ones, and a resume as exact as from fp32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moestro.checkpoints.files import ModelFiles, load_model
from moestro.config import Config
from moestro.engine.language_model import load
from moestro.errors import ConfigError
from moestro.training.checkpoint import find_fault
from moestro.training.loop import train

Make = Callable[..., Config]
POWERS = "fp8.scale=ue8m0"
LAST = "checkpoints/step-00000012"


@pytest.fixture(scope="module")
def fp8_run(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved") / "run"
    train(make_config("train.save_dtype=fp8", "train.checkpoint_every=7", POWERS), run, quiet=True)
    return run


def state_of(checkpoint: Path) -> dict[str, Tensor]:
    """Master weights and moments."""
    master = checkpoint / "train_state" / "master"
    weights = load_file((master if master.is_dir() else checkpoint) / "model.safetensors")
    return weights | load_file(checkpoint / "train_state" / "optimizer.safetensors")


def assert_equal_states(one: Path, other: Path) -> None:
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_is_saved_changes_nothing_in_training(fp8_run: Path, tiny_run: Path) -> None:
    assert_equal_states(fp8_run / LAST, tiny_run / LAST)
    assert find_fault(fp8_run / LAST) is None
    manifest = json.loads((fp8_run / LAST / "manifest.json").read_text("utf-8"))
    assert "train_state/master/model.safetensors" in manifest


@pytest.mark.parametrize("then", ["fp8", "bf16", "fp32"])
def test_a_resume_is_exact(make_config: Make, fp8_run: Path, tiny_run: Path, tmp_path: Path, then: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(fp8_run, run)
    shutil.rmtree(run / LAST)
    config = make_config(f"train.save_dtype={then}", "train.checkpoint_every=7", POWERS)
    outcome = train(config, run, resume=True, quiet=True)
    assert outcome.step == 12
    assert_equal_states(run / LAST, tiny_run / LAST)
    assert (run / LAST / "train_state" / "master").is_dir() == (then != "fp32")


def test_the_directory_is_an_fp8_model(fp8_run: Path, tiny_run: Path, tmp_path: Path) -> None:
    files, whole = ModelFiles(fp8_run / LAST), load_model(tiny_run / LAST)
    assert files.stored_format("layers.1.ffn.experts.gate_up") == "fp8"
    assert str(files.scheme) == "fp8, blocks 128 x 128, ue8m0 scales" and files.dtype == torch.bfloat16
    ours, theirs = (
        model.get_parameter("layers.1.ffn.experts.down").float() for model in (load_model(fp8_run / LAST), whole)
    )
    block = theirs.abs().amax((-1, -2), keepdim=True)  # one block an expert
    error = (ours - theirs).abs()
    assert error.max() > 0 and (error <= theirs.abs() * (2**-4 + 2**-8) + block / 448 * 2**-9).all()
    shutil.copytree(fp8_run / LAST, tmp_path / "model")
    assert load(tmp_path / "model").tokenizer.fingerprint == load(tiny_run).tokenizer.fingerprint


def test_other_types_are_refused(make_config: Make) -> None:
    with pytest.raises(ConfigError, match="save_dtype"):
        make_config("train.save_dtype=int8")
