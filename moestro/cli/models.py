"""Which model a command means: a path, a name of the Hugging Face Hub, or none, which lists what is there."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moestro.cli.hints import format_command
from moestro.cli.output import print_note
from moestro.errors import ConfigError, MoestroError

RUNS = Path("runs")
Model = Annotated[
    Path | None,
    Parameter(
        help="A run, a checkpoint, a Hugging Face directory, packed weights, or ORG/NAME in the Hugging Face cache. "
        "Without it, the models in runs/ are listed."
    ),
]
Download = Annotated[
    bool, Parameter(negative="", help="Fetch a model named ORG/NAME from the Hugging Face Hub if it is not cached.")
]


def choose_model(model: Path | None, download: bool, *command: str) -> Path:
    """The directory or the name that `model` means, downloaded if asked for.

    ConfigError if it is None, after listing what there is. `command` is what the user called, to say what to type.
    """
    from moestro.checkpoints import hub

    if model is None:
        list_models(*command)
        raise ConfigError("name a model: a run, a checkpoint or a Hugging Face directory", hint=next_step())
    if not hub.is_hub_name(model) or model.exists():
        return model
    if download:
        return hub.download(model.as_posix())
    if hub.find_cached(model.as_posix()) is None:
        fetch = shlex.join(["moestro", *command, str(model), "--download"])
        raise MoestroError(f"{model} is not here", hint=f"to fetch it from the Hugging Face Hub: {fetch}")
    return model


def next_step() -> str | None:
    """What to do where there is no model at all."""
    return None if any(find_models(RUNS)) else "moestro train --preset demo makes one in five minutes"


def list_models(*command: str) -> None:
    """Print, on standard error, the command for every model in runs/, with its date, size and loss."""
    for path in find_models(RUNS):
        print_note(f"  {format_command(*command, path)}   {describe_model(path)}")


def find_models(folder: Path) -> Iterator[Path]:
    """Runs with a checkpoint and model directories in a folder, the newest first."""
    names = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime) if folder.is_dir() else []
    yield from (path for path in names if any(path.glob("checkpoints/step-*")) or (path / "config.json").is_file())


def describe_model(path: Path) -> str:
    """Its date, the size of its weights, and its bits per byte if they were measured."""
    from moestro.engine.language_model import find_model_directory

    directory = find_model_directory(path)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(directory.stat().st_mtime))
    return ", ".join([date, f"{size / 1e6:,.1f} MB", *describe_loss(path / "evals.jsonl")])


def describe_loss(evaluations: Path) -> list[str]:
    """The bits per byte of a run's last evaluation, if it has one that can be read."""
    try:
        last = json.loads(evaluations.read_text("utf-8").splitlines()[-1])
        return [f"{last['bits_per_byte']:.3f} bits per byte"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
