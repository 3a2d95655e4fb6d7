"""Checkpoints: whole or not there, verified, never pickled, loadable by `transformers`."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.language_model import load
from moestro.errors import CheckpointError
from moestro.model.attention import AttentionBatch
from moestro.training import checkpoint
from moestro.training.checkpoint import (
    TrainState,
    find_fault,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from moestro.training.prepare import build_model

STATE = TrainState(1, 9, 128, 0.5, 0, {"key": "x"})
Saver = Callable[..., Path]


@pytest.fixture
def save(make_config: Callable[..., Config], tokenizer: Tokenizer, tmp_path: Path) -> Saver:
    """`save(step, keep=2)`: a checkpoint of an untrained model in tmp_path."""
    model, optimizers = build_model(make_config())

    def write(step: int, keep: int = 2) -> Path:
        return save_checkpoint(tmp_path, model, tokenizer, optimizers, replace(STATE, step=step), keep=keep)

    return write


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_last_few_are_kept_and_leftovers_removed(save: Saver, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001.tmp").mkdir(parents=True)
    for step in (1, 2, 3, 4):
        save(step)
    assert steps(tmp_path) == [3, 4]
    assert all(find_fault(path) is None for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "train_state/optimizer.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [flip_byte, Path.unlink, lambda path: os.truncate(path, 10)])
def test_a_damaged_checkpoint_is_passed_over(
    save: Saver, tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    save(1)
    newest = save(2)
    damage(newest / name)
    assert name in str(find_fault(newest))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    damage(tmp_path / "checkpoints" / "step-00000001" / name)
    with pytest.raises(CheckpointError, match="no checkpoint of"):
        latest_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_written_again(save: Saver, tmp_path: Path) -> None:
    flip_byte(save(2) / "model.safetensors")
    assert find_fault(save(2)) is None


def test_damaged_later_checkpoints_do_not_push_out_a_new_one(save: Saver, tmp_path: Path) -> None:
    save(1)
    flip_byte(save(9) / "model.safetensors")
    save(3, keep=1)
    assert steps(tmp_path) == [3]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000003"


def test_a_checkpoint_is_on_disk_by_name_before_old_ones_go(
    save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    synced: list[tuple[Path, list[int]]] = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append((path, steps(tmp_path))))
    save(2, keep=1)
    assert synced == [(tmp_path / "checkpoints", [1, 2]), (tmp_path, [1, 2])] and steps(tmp_path) == [2]


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("target", ["save_file", "write_tensors", "sync_directory", "os.replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    before = save(1)
    with monkeypatch.context() as patch:
        owner, name = (os, "replace") if target == "os.replace" else (checkpoint, target)
        patch.setattr(owner, name, full_disk)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            save(2)
    assert "\n" not in str(caught.value)
    assert steps(tmp_path) == [1]
    assert latest_checkpoint(tmp_path) == before
    assert save(2).name == "step-00000002"


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let every write beyond `limit` bytes of a file fail, as the kernel does it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_refuses_is_one_clear_error(save: Saver, tmp_path: Path) -> None:
    before = save(1)
    with small_files(20_000), pytest.raises(CheckpointError, match=r"cannot write checkpoint .* too large"):
        save(2)
    assert steps(tmp_path) == [1]
    assert latest_checkpoint(tmp_path) == before


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_everything_comes_back(
    make_config: Callable[..., Config], tokenizer: Tokenizer, tmp_path: Path, moments: str
) -> None:
    config = make_config(f"train.moments={moments}")
    model, optimizers = build_model(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step(1e-3)
    for _, router in model.routers():
        router.bias.normal_()
    path = save_checkpoint(tmp_path, model, tokenizer, optimizers, STATE, keep=1)
    other, other_optimizers = build_model(make_config("train.seed=5", f"train.moments={moments}"))
    assert load_checkpoint(path, other, other_optimizers) == STATE
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    ours, theirs = optimizers.state_tensors(), other_optimizers.state_tensors()
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())


def test_a_state_of_another_version_is_named(save: Saver, make_config: Callable[..., Config]) -> None:
    path = save(1)
    (path / "train_state" / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match="another version"):
        load_checkpoint(path, *build_model(make_config()))


def test_transformers_loads_a_checkpoint_with_equal_logits(tiny_run: Path) -> None:
    path = latest_checkpoint(tiny_run)
    assert path is not None
    theirs = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ours = load(tiny_run)
    tokens = torch.tensor([0, *ours.tokenizer.encode("the cat sat on the big red mat")])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        logits = ours.model(tokens, AttentionBatch.causal(1, len(tokens)), logits=True).logits
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    their_tokenizer = AutoTokenizer.from_pretrained(path)
    text = "the été dog 345 ran\n"
    assert their_tokenizer.encode(text, add_special_tokens=False) == ours.tokenizer.encode(text)


def test_nothing_is_pickled(tiny_run: Path) -> None:
    suffixes = {path.suffix for path in tiny_run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".bin", ".npy", ".html", ".tokens", ".offsets", ".lock"}
    assert [path.name for path in tiny_run.rglob("*.bin")] == ["routing.bin"]  # a raw array
    assert not any(path.read_bytes()[:1] == b"\x80" and path.suffix != ".tokens" for path in tiny_run.rglob("*.json"))


def test_a_copied_checkpoint_stands_alone(tiny_run: Path, tmp_path: Path) -> None:
    path = latest_checkpoint(tiny_run)
    assert path is not None
    shutil.copytree(path, tmp_path / "model")
    assert load(tmp_path / "model").generate("the cat", max_tokens=4) == load(tiny_run).generate(
        "the cat", max_tokens=4
    )


@pytest.mark.parametrize("manifest", ["{}", '{"train_state/state.json": 3}'])
def test_a_manifest_that_says_nothing_is_a_fault(save: Saver, tmp_path: Path, manifest: str) -> None:
    save(1)
    (save(2) / "manifest.json").write_text(manifest)
    heard: list[str] = []
    assert latest_checkpoint(tmp_path, heard.append) == tmp_path / "checkpoints" / "step-00000001"
    assert len(heard) == 1 and "step-00000002" in heard[0]
