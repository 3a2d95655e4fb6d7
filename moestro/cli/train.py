"""`moestro train`: train your own model from a folder of text."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from moestro.cli.hints import format_command
from moestro.cli.output import outlive_output, print_json
from moestro.cli.process import IgnoredKeys
from moestro.config import SETTINGS, Config, apply_overrides, build_config, load_file, load_preset
from moestro.errors import ConfigError
from moestro.sizes import tree_of_depth


def train(
    *overrides: str,
    preset: str | None = None,
    config: Path | None = None,
    depth: int | None = None,
    data: str | None = None,
    out: Path | None = None,
    start: Annotated[str | None, Parameter(name="--from")] = None,
    keys: IgnoredKeys = frozenset(),
    threads: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Train a model on your own text; without arguments, the demo on the built-in corpus.

    Ctrl-C, SIGTERM and a closed terminal save a checkpoint; --resume goes on from the last one.

    Parameters
    ----------
    overrides
        Settings as section.key=value, such as train.steps=40 model.top_k=4.
    preset
        A shipped configuration: demo, small, deepseek-v3, …
    config
        A TOML or JSON file with sections [model], [train], [data], [fp8].
    depth
        One dial for size: the number of layers sets width, heads, experts, learning rate and steps.
    data
        A file or folder (.txt .md .py .json .jsonl .parquet, also .gz .zst), a Hugging Face data set, or builtin.
    out
        The run directory; runs/NAME by default.
    start
        A run, checkpoint or Hugging Face directory whose weights, sizes and tokenizer training starts from.
    threads
        The same as train.threads=N: threads to compute with, 0 for every core this process may use.
    resume
        Go on with the run in --out. Of a finished run, with more train.steps (or train.minutes), train it further.
    dry_run
        Print the configuration and the size of the model, and stop.
    quiet
        Show no progress.
    json_output
        Print the outcome as one JSON object on the last line.
    """
    tree, name = choose_tree(preset, config, depth)
    if data is not None:
        tree = apply_overrides(tree, [f"data.source={json.dumps(data)}"])
        name = Path(os.path.abspath(data)).stem or name  # .. is not the name of a folder
    if start is not None:
        tree, name = start_from(tree, Path(start), keys), Path(os.path.abspath(start)).name
    run = out or free_directory(Path("runs"), name, resume)
    if threads is not None:
        overrides = (*overrides, f"train.threads={threads}")
    given = any((preset, config, depth, data, start))
    settings = resume_config(tree, overrides, run, given=given, resume=resume)
    if dry_run:
        return print_plan(settings)
    return run_and_report(settings, run, resume=resume, quiet=quiet, json_output=json_output)


def print_plan(settings: Config) -> int:
    """Print the configuration and the size of the model as JSON."""
    from moestro.model.size import describe_size

    print_json({"config": settings.model_dump(mode="json"), **describe_size(settings.model)})
    return 0


def run_and_report(settings: Config, run: Path, *, resume: bool, quiet: bool, json_output: bool) -> int:
    """Train, write the report and print the ending; returns the exit code."""
    from moestro import machine
    from moestro.parallel import world
    from moestro.report import write_report
    from moestro.training.loop import train as run_training

    machine.use_threads(settings.train.threads)
    machine.keep_freed_memory()
    with world.join() as processes:
        outcome = run_training(settings, run, resume=resume, quiet=quiet, world=processes)
        if not processes.is_main:
            return 128 + outcome.stopped_by if outcome.stopped_by else 0
    report = write_report(run)
    evaluation = outcome.evaluation or {}
    with outlive_output():  # the terminal may be what has gone
        if not quiet or not outcome.steps_now:  # that nothing was to be done is no progress
            print_ending(outcome, report)
        if json_output:
            print_json(
                {"run": str(run), "step": outcome.step, "steps": outcome.total_steps, "report": str(report),
                 "bits_per_byte": evaluation.get("bits_per_byte"), "finished": outcome.stopped_by is None}
            )  # fmt: skip
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def start_from(tree: dict[str, Any], path: Path, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The raw configuration, set to start from a directory's model: its sizes, weights and tokenizer."""
    from moestro.checkpoints.files import ModelFiles
    from moestro.engine.language_model import find_model_directory

    directory = find_model_directory(path)
    model = ModelFiles(directory, ignored_keys=ignored).config.model_dump(mode="json")
    train = {**tree.get("train", {}), "start_from": str(directory), "ignore_config_keys": sorted(ignored)}
    data = {**tree.get("data", {}), "tokenizer": str(directory / "tokenizer.json")}
    return {**tree, "model": model, "train": train, "data": data}


def choose_tree(preset: str | None, config: Path | None, depth: int | None) -> tuple[dict[str, Any], str]:
    """The raw configuration that the flags name, and a name for the run."""
    if sum(choice is not None for choice in (preset, config, depth)) > 1:
        raise ConfigError("give one of --preset, --config and --depth")
    if config is not None:
        return load_file(config), config.stem
    if depth is not None:
        return tree_of_depth(depth), f"depth-{depth}"
    return load_preset(preset or "demo"), preset or "demo"


def free_directory(parent: Path, name: str, resume: bool) -> Path:
    """parent/name if it is free or with --resume, else the first of name-2, name-3, … that is free."""
    run, number = parent / name, 1
    while not resume and (run / SETTINGS).exists():
        number += 1
        run = parent / f"{name}-{number}"
    return run


def resume_config(tree: dict[str, Any], overrides: tuple[str, ...], run: Path, *, given: bool, resume: bool) -> Config:
    """What to run: a resumed run keeps its saved configuration unless the flags name another.

    More steps than a run planned from minutes are steps that count.
    """
    saved = run / SETTINGS
    if resume and not given and saved.exists():
        tree = load_file(saved)
        names = {pair.partition("=")[0].strip() for pair in overrides}
        if "train.steps" in names and "train.minutes" not in names:
            overrides = (*overrides, "train.minutes=0")
    return build_config(tree, overrides)


def print_ending(outcome: Any, report: Path) -> None:
    """Print samples, or how to continue, and the commands to type next."""
    run = outcome.run
    if outcome.stopped_by:
        print(f"\nStopped and saved at step {outcome.step} of {outcome.total_steps}. Go on with:")
        print(f"  {format_command('train', '--out', run, '--resume')}")
        return
    if not outcome.steps_now:
        print(f"\nAll {outcome.step} steps were done before. Ask for more of them, or start another run from this one:")
        print(f"  {format_command('train', '--out', run, '--resume', f'train.steps={2 * outcome.step}')}")
        print(f"  {format_command('train', '--from', run)}")
        return
    for sample in outcome.samples:
        print(f"\n── {sample['domain']} " + "─" * 60)
        print(f"{sample['prompt'].strip()} ▸{sample['text'].rstrip()}")
    print(f"\nTrained {outcome.step} steps. The report is {report}: open it in a browser. Next:")
    for words in (("chat", run), ("generate", run, "Once upon a time"), ("eval", run, "--json")):
        print(f"  {format_command(*words)}")
