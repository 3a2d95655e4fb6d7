"""Training that starts from the weights of a directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moestro.checkpoints.files import ModelFiles, load_model
from moestro.cli import app
from moestro.config import build_config, load_file
from moestro.data.tokenizer import Tokenizer
from moestro.engine.language_model import find_model_directory
from moestro.errors import CheckpointError
from moestro.training.loop import train
from moestro.training.prepare import open_session


def settings_from(run: Path, *overrides: str) -> dict[str, object]:
    """The settings of a run, with its model as the start of another."""
    tree = load_file(run / "settings.json")
    directory = find_model_directory(run)
    tree["model"] = ModelFiles(directory).config.model_dump(mode="json")
    tree["train"] |= {"start_from": str(directory)}
    tree["data"] |= {"tokenizer": str(directory / "tokenizer.json")}
    return tree


def test_a_run_begins_with_the_weights_that_it_is_given(tiny_run: Path, tmp_path: Path) -> None:
    config = build_config(settings_from(tiny_run))
    said: list[str] = []
    session = open_session(config, tmp_path / "run", resume=False, log=said.append)
    given = load_model(find_model_directory(tiny_run), torch.float32)
    for (name, ours), theirs in zip(session.model.named_parameters(), given.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for (_, ours), (_, theirs) in zip(session.model.routers(), given.routers(), strict=True):
        assert torch.equal(ours.bias, theirs.bias)
    original = Tokenizer.from_file(find_model_directory(tiny_run) / "tokenizer.json")
    assert session.tokenizer.fingerprint == original.fingerprint
    assert any("Starting from the weights of" in line for line in said)


def test_a_run_that_went_on_begins_below_a_fresh_one(tiny_run: Path, tmp_path: Path) -> None:
    losses = {}
    for name, start in (("fresh", ""), ("on", str(find_model_directory(tiny_run)))):
        tree = settings_from(tiny_run)
        tree["train"]["start_from"] = start  # type: ignore[index]
        train(build_config(tree, ["train.steps=2"]), tmp_path / name, quiet=True)
        losses[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()[0])["loss"]
    assert losses["on"] < losses["fresh"] - 0.05


def test_the_command_takes_sizes_and_tokenizer_from_the_directory(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--from", str(tiny_run), "--dry-run", "--json", "train.steps=2"]
    app(arguments, result_action="return_value")
    planned = json.loads(capsys.readouterr().out)["config"]
    saved = load_file(tiny_run / "settings.json")
    assert planned["model"]["hidden_dim"] == saved["model"]["hidden_dim"]
    assert planned["train"]["start_from"] == str(find_model_directory(tiny_run))
    assert planned["data"]["tokenizer"].endswith("tokenizer.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        app(["train", "--from", str(tmp_path / "nothing")], exit_on_error=False, result_action="return_value")


def test_a_model_of_other_sizes_is_refused(tiny_run: Path, tmp_path: Path, make_config: Callable[..., object]) -> None:
    tree = settings_from(tiny_run)
    config = build_config(tree, ["model.expert_dim=24"])
    with pytest.raises(CheckpointError, match="a model of other sizes"):
        open_session(config, tmp_path / "run", resume=False, log=lambda _: None)
