"""Checkpoints: each is a Hugging Face model directory plus `train_state/`, whole or not there at all.

    RUN/checkpoints/step-00000100/   config.json, model*.safetensors, tokenizer.json, …   anyone can load this
                    train_state/     optimizer.safetensors, state.json                    what a resume needs
                    manifest.json    size and sha256 of every file, written last

Written as `step-N.tmp`, synced file by file, then renamed: a killed process or a full disk leaves the previous
checkpoint in force, and the newest directory is the newest checkpoint. Weights are the fp32 master weights, so a
resume is exact. Where they are saved in bf16 or FP8, the fp32 ones are a model directory `train_state/master/`. A
checkpoint is verified against its manifest before it is used; if it is damaged, the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro.checkpoints.convert import Precision, write_converted
from moestro.checkpoints.files import (
    ModelFiles,
    fill_model,
    model_tensors,
    read_json,
    sync,
    sync_directory,
    write_tensors,
)
from moestro.checkpoints.hf import config_to_hf
from moestro.data.tokenizer import Tokenizer
from moestro.errors import CheckpointError
from moestro.model.transformer import Transformer
from moestro.ops.fp8 import Scale
from moestro.parallel.world import ONE, World
from moestro.training.optim import Optimizers

SaveDtype = Literal["fp32"] | Precision
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}  # small models repeat themselves when greedy


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: steps done of `total_steps` planned, tokens and seconds spent, the packer's position.

    `warm_from`: the step from which the learning rate warms up, 0 or where a decayed run was given more steps.
    """

    step: int
    total_steps: int
    tokens: int
    seconds: float
    skipped: int
    pack: dict[str, Any]
    warm_from: int = 0


def write_model_directory(
    directory: Path, model: Transformer, tokenizer: Tokenizer, tensors: Iterator[tuple[str, Tensor]] | None = None
) -> None:
    """The Hugging Face half: weights in their stored precision, config, tokenizer, generation defaults.

    `tensors`: the weights, if they are not simply the model's own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, model_tensors(model) if tensors is None else tensors)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_config_files(directory, model, tokenizer, dtype)


def write_config_files(directory: Path, model: Transformer, tokenizer: Tokenizer, dtype: str) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    _write_json(directory / "config.json", config_to_hf(model.config, **ids, dtype=dtype))
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        **SAMPLING,
    }
    _write_json(directory / "generation_config.json", generation)
    tokenizer.save(directory)


def save_checkpoint(
    run: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizers: Optimizers,
    state: TrainState,
    *,
    keep: int,
    dtype: SaveDtype = "fp32",
    scale: Scale = "fp32",
    world: World = ONE,
) -> Path:
    """Write a checkpoint and drop all but the newest `keep`; returns its directory. A whole one is not written again.

    `dtype` is that of the model directory: fp32, bf16, or fp8 with scales of the kind `scale`.
    Every process of the world calls this and returns once the main one has written.
    """
    final = run / "checkpoints" / f"step-{state.step:08d}"
    tensors, moments = model_tensors(model), optimizers.state_tensors()
    if world.is_main:
        if not final.exists() or find_fault(final) is not None:
            with _new_checkpoint(final) as partial:
                write_model_directory(_master(partial, dtype), model, tokenizer, tensors)
                _convert_master(partial, dtype, scale)
                (partial / "train_state").mkdir(exist_ok=True)
                save_file(moments, partial / "train_state" / "optimizer.safetensors")
                _write_json(partial / "train_state" / "state.json", asdict(state))
            _drop_old(run, final, keep)
    else:
        for _ in tensors:  # shards are gathered as they are asked for
            pass
    world.wait()
    return final


def _master(checkpoint: Path, dtype: SaveDtype) -> Path:
    """Where the master weights are: they are the model directory itself, or beside one of another type."""
    return checkpoint if dtype == "fp32" else checkpoint / "train_state" / "master"


def _convert_master(checkpoint: Path, dtype: SaveDtype, scale: Scale) -> None:
    """Write the model directory from the master weights, if it is of another type."""
    if dtype != "fp32":
        write_converted(ModelFiles(_master(checkpoint, dtype)), checkpoint, dtype, scale)


@contextmanager
def _new_checkpoint(final: Path) -> Iterator[Path]:
    """Give a folder that becomes the checkpoint `final`, with a manifest, when all is written and on disk."""
    folder, partial = final.parent, final.with_suffix(".tmp")
    if final.exists():
        shutil.rmtree(final)
    for stale in folder.glob("*.tmp"):
        shutil.rmtree(stale)
    try:
        yield partial
        manifest = {name: _fingerprint(partial / name) for name in _file_names(partial)}
        _write_json(partial / "manifest.json", manifest)
        sync_directory(partial)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        reason, step = getattr(error, "strerror", None) or error, newest_step(folder.parent)
        left = "nothing had been saved before" if step is None else f"the checkpoint of step {step} is intact"
        raise CheckpointError(f"cannot write checkpoint {final}: {reason}; {left}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # already gone if all went well
    for changed in (folder, folder.parent):  # the new names, before old checkpoints are deleted
        sync(changed)


def _drop_old(run: Path, final: Path, keep: int) -> None:
    kept = _checkpoints(run)
    newest = kept.index(final)  # later ones were damaged: the run went back behind them
    for old in [*kept[: max(newest + 1 - keep, 0)], *kept[newest + 1 :]]:
        shutil.rmtree(old)


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint, which is not verified; None if there is none."""
    names = [path.name.removeprefix("step-") for path in _checkpoints(run)]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def latest_checkpoint(run: Path, log: Callable[[str], None] | None = None) -> Path | None:
    """The newest whole checkpoint of a run, or None if it has none; CheckpointError if all are damaged.

    `log` is told of skipped ones.
    """
    candidates = _checkpoints(run)
    broken = []
    for directory in reversed(candidates):
        fault = find_fault(directory)
        if fault is None:
            return directory
        broken.append(fault)
        if log is not None:
            log(f"Passing over a damaged checkpoint: {fault}")
    if broken:
        raise CheckpointError(f"no checkpoint of {run} is whole: {broken[0]}")
    return None


def find_fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint against its manifest; None if it is whole."""
    try:
        manifest = read_json(directory / "manifest.json")
    except CheckpointError as error:
        return str(error)
    if "train_state/state.json" not in manifest:
        return f"{directory}/manifest.json does not name the files of a checkpoint"
    for name, expected in manifest.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        size = expected.get("bytes") if isinstance(expected, dict) else None
        if path.stat().st_size != size or _fingerprint(path) != expected:
            return f"{path} differs from its manifest"
    return None


def load_checkpoint(directory: Path, model: Transformer, optimizers: Optimizers) -> TrainState:
    """Fill model and optimizers from a checkpoint and return where it stood."""
    master = directory / "train_state" / "master"
    fill_model(model, ModelFiles(master if master.is_dir() else directory))
    optimizers.load_state_tensors(load_file(directory / "train_state" / "optimizer.safetensors"))
    tree = read_json(directory / "train_state" / "state.json")
    try:
        return TrainState(**tree)
    except TypeError as error:
        raise CheckpointError(f"{directory}/train_state/state.json is of another version: {error}") from error


def _checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".tmp")


def _file_names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
