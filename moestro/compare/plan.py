"""A comparison as a directory: what was asked for, and the configuration of every run.

    DIR/compare.json                 the request
    DIR/data/                        tokenizer and shards, made once
    DIR/cells/SLUG/seed-S.json       the configuration of a run
    DIR/cells/SLUG/seed-S.log        what its process said
    DIR/cells/SLUG/seed-S/           its run directory, whose data is a link to DIR/data

A later request for the same directory may add cells and seeds; anything else would mix runs that cannot be compared.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro import machine
from moestro.compare.budget import Budget, parse_budget
from moestro.compare.cells import SizedCell, base_config, parse_cells, size_cell
from moestro.compare.results import REQUEST, REQUEST_VERSION, run_path
from moestro.config import SETTINGS, Config, build_config, load_file
from moestro.errors import ConfigError
from moestro.training.metrics import write_atomic
from moestro.training.ownership import LOCK
from moestro.training.prepare import open_data
from moestro.version import __version__

FIXED = ("version", "budget", "settings", "expansion", "threads", "jobs")  # of the request, by its keys


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is trained. `threads` is per run; `overrides` are those of the base."""

    directory: Path
    routers: str
    preset: str
    overrides: tuple[str, ...]
    base: Config
    cells: tuple[SizedCell, ...]
    seeds: tuple[int, ...]
    budget: Budget
    expansion: int
    jobs: int
    threads: int

    def runs(self) -> Iterator[tuple[SizedCell, int]]:
        """Every cell of the first seed, then every cell of the next, so a whole table exists early."""
        for seed in self.seeds:
            yield from ((cell, seed) for cell in self.cells)

    def config(self, cell: SizedCell, seed: int) -> Config:
        """What the run of a cell and seed trains. Overrides of `train` win over settings derived from the budget."""
        tree = cell.config.model_dump(mode="json")
        tree["train"] |= self.budget.train_keys(cell.config) | {"seed": seed, "threads": self.threads}
        return build_config(tree, [pair for pair in self.overrides if pair.strip().startswith("train.")])

    def run(self, cell: SizedCell, seed: int) -> Path:
        """Its run directory."""
        return run_path(self.directory, cell.cell, seed)


def make_plan(
    directory: Path,
    routers: str,
    tree: dict[str, Any],
    overrides: Sequence[str],
    *,
    preset: str,
    seeds: int,
    budget: str,
    equal: str | None,
    expansion: int,
    jobs: int,
) -> Plan:
    """Read a request; `tree` is the preset's. Raises `ConfigError` for anything that cannot be run."""
    for name, number in (("seeds", seeds), ("expansion", expansion), ("jobs", jobs)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}")
    cores = machine.usable_threads()
    if jobs > cores:
        raise ConfigError(f"{jobs} jobs need as many cores, and {cores} may be used", hint="give fewer --jobs")
    base = base_config(tree, overrides)
    return Plan(
        directory=directory,
        routers=routers,
        preset=preset,
        overrides=tuple(overrides),
        base=base,
        cells=tuple(size_cell(cell, base, expansion) for cell in parse_cells(routers)),
        seeds=tuple(range(seeds)),
        budget=parse_budget(budget, equal, base),
        expansion=expansion,
        jobs=jobs,
        threads=base.train.threads or cores // jobs,
    )


def prepare_directory(plan: Plan, command: str, log: Callable[[str], None]) -> None:
    """Make or reopen DIR: check that it holds nothing else, prepare the data, write the request and all configurations.

    Raises `ConfigError` if DIR holds other files, another request or runs with other settings.
    """
    directory = plan.directory
    request = describe_request(plan, command)
    fresh = not (directory / REQUEST).exists()
    if not fresh:
        check_request(load_file(directory / REQUEST), request, directory)
    elif directory.is_file() or (directory.is_dir() and {path.name for path in directory.iterdir()} - {"data", LOCK}):
        raise ConfigError(f"{directory} exists and is not a comparison", hint="choose another --out")
    for cell, seed in plan.runs():
        check_run(plan.run(cell, seed), plan.config(cell, seed))
    open_data(plan.base, directory, log, fresh=fresh)
    write_atomic(directory / REQUEST, _to_json(request))
    for cell, seed in plan.runs():
        run = plan.run(cell, seed)
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run.with_suffix(".json"), _to_json(plan.config(cell, seed).model_dump(mode="json")))
        if not (run / "data").is_symlink():
            (run / "data").symlink_to(Path("..", "..", "..", "data"), target_is_directory=True)


def describe_request(plan: Plan, command: str) -> dict[str, Any]:
    """The content of compare.json."""
    budget = plan.budget
    return {
        "version": REQUEST_VERSION,
        "routers": plan.routers,
        "cells": [cell.cell.label for cell in plan.cells],
        "seeds": list(plan.seeds),
        "budget": {"kind": budget.kind, "value": budget.value, "text": budget.text},
        "preset": plan.preset,
        "command": command,
        "machine": machine.describe_machine().cpu,
        "threads": plan.threads,
        "jobs": plan.jobs,
        "versions": {
            "moestro": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": describe_commit(),
        "settings": plan.base.model_dump(mode="json"),
        "expansion": plan.expansion,
    }


def check_request(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
    """Refuse a request unless it is the old one with cells or seeds added."""
    different = [name for name in FIXED if old.get(name) != new[name]]
    if different:
        raise ConfigError(
            f"{directory} holds a comparison with another {', '.join(different)}",
            hint="ask for the same (cells and seeds may be added), or choose another --out",
        )
    wanted = set(parse_cells(new["routers"]))
    missing = [cell.label for cell in parse_cells(old["routers"]) if cell not in wanted]
    missing += [f"seed {seed}" for seed in old["seeds"] if seed not in new["seeds"]]
    if missing:
        raise ConfigError(
            f"{directory} holds {', '.join(missing)}, which this request changes or leaves out; cells and seeds may "
            "only be added",
            hint="or choose another --out",
        )


def check_run(run: Path, config: Config) -> None:
    """Refuse a run that was started with other settings, for example before its scheme's file was edited."""
    saved = run / SETTINGS
    if not saved.exists():
        return
    then = build_config(load_file(saved))
    if config.train.precision == "auto":  # a run saves what was measured
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"precision": then.train.precision})}
        )
    if then != config:
        raise ConfigError(
            f"{run} was started with other settings",
            hint="remove it to train it again, or choose another --out",
        )


def describe_commit() -> str | None:
    """The commit of the running code, "-dirty" if files differ from it; None outside a repository."""
    git = ("git", "-C", str(Path(__file__).parent))
    tracked, commit = ("ls-files", "--error-unmatch", "__init__.py"), ("describe", "--always", "--dirty", "--exclude=*")
    try:
        answers = [
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=False, timeout=10)
            for arguments in (tracked, commit)
        ]
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a file system that hangs
        return None
    return None if any(answer.returncode for answer in answers) else answers[-1].stdout.strip()


def _to_json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
