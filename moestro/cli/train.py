"""`moestro train`: train your own model from a folder of text."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from moestro.cli.hints import format_command
from moestro.cli.output import outlive_output, print_json
from moestro.cli.plan import Open, Printed, set_train, settle, settle_length
from moestro.cli.process import IgnoredKeys
from moestro.config import SETTINGS, Config, build_config, load_file, load_preset
from moestro.errors import ConfigError
from moestro.sizes import DEFAULT_MINUTES, tree_of_depth
from moestro.terminal import printable_lines


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TextAndTime:
    """What to train on, and for how long.

    Parameters
    ----------
    data
        A file or folder (docs/training.md lists what is read), a Hugging Face data set, or builtin.
    encoding
        Of files that are not UTF-8, such as cp1252 or cp949; by default it is guessed.
    text_field
        The field or column of a record that holds its text; by default text, content, or a conversation.
    minutes
        How long to train; with --data and no size, 30 by default.
    steps
        How many steps to train, whatever a preset says of minutes.
    """

    data: str | None = None
    encoding: str | None = None
    text_field: str | None = None
    minutes: float | None = None
    steps: int | None = None

    def data_keys(self) -> dict[str, str]:
        """Those that are settings of [data], under their names there; a folder's name is no TOML."""
        values = {"source": self.data, "encoding": self.encoding, "text_field": self.text_field}
        return {name: value for name, value in values.items() if value is not None}

    def overrides(self, threads: int | None) -> tuple[str, ...]:
        """Those that are settings of [train], and the threads."""
        values = {"train.minutes": self.minutes, "train.steps": self.steps, "train.threads": threads}
        return tuple(f"{key}={value}" for key, value in values.items() if value is not None)


def train(
    *overrides: str,
    preset: str | None = None,
    config: Path | None = None,
    depth: int | None = None,
    text: TextAndTime | None = None,
    out: Path | None = None,
    start: Annotated[str | None, Parameter(name="--from")] = None,
    keys: IgnoredKeys = frozenset(),
    threads: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Train a model that fits your text; without arguments, the demo on the built-in corpus.

    Ctrl-C, SIGTERM and a closed terminal save a checkpoint; --resume goes on from the last one.

    Parameters
    ----------
    overrides
        Settings as section.key=value, such as train.lr=2e-3 model.top_k=4.
    preset
        A shipped configuration: demo, small, deepseek-v3, …
    config
        A TOML or JSON file with sections [model], [train], [data], [fp8].
    depth
        One dial for size: the number of layers sets width, heads, experts and learning rate; the text sets the steps.
    out
        The run directory; runs/NAME by default.
    start
        A run, checkpoint or Hugging Face directory whose weights, sizes and tokenizer training starts from.
    threads
        The same as train.threads=N: threads to compute with, 0 for every core this process may use.
    resume
        Go on with the run in --out. Of a finished run, with more train.steps (or train.minutes), train it further.
    dry_run
        Print the plan and stop.
    quiet
        Show neither plan nor progress.
    json_output
        Print the outcome, or the plan of a dry run, as one JSON object on the last line.
    """
    text = text or TextAndTime()
    tree, name = choose_tree(preset, config, depth, start, text.data)
    if start is not None:
        tree = start_from(tree, Path(start), keys)
    run = out or free_directory(Path("runs"), name, resume)
    if resume and (run / SETTINGS).exists() and not (preset or config or depth or start):
        tree = load_file(run / SETTINGS)  # a resumed run keeps its configuration unless the flags name another
    tree = {**tree, "data": {**tree.get("data", {}), **text.data_keys()}}
    left_open = what_is_open(resume or preset or config, depth or start, text.data)
    overrides = settle_length((*overrides, *text.overrides(threads)), from_text=left_open.length)
    settings = build_config(tree, overrides)
    prepare_machine(settings)
    if dry_run or left_open.length or not (resume or quiet):
        printed = Printed(quiet=quiet, dry_run=dry_run, json=json_output)
        settings = settle(tree, overrides, left_open, run, printed)
    return 0 if dry_run else run_and_report(settings, run, resume=resume, quiet=quiet, json_output=json_output)


def what_is_open(settled: object, sized: object, data: str | None) -> Open:
    """What follows from the text: nothing where all is `settled`, the length alone where the size is given."""
    if settled:
        return Open(size=False, length=False)
    return Open(size=not sized and data is not None, length=bool(sized) or data is not None)


def prepare_machine(settings: Config) -> None:
    """Threads and allocator of this process, before anything large."""
    from moestro import machine

    machine.use_threads(settings.train.threads)
    machine.keep_freed_memory()


def run_and_report(settings: Config, run: Path, *, resume: bool, quiet: bool, json_output: bool) -> int:
    """Train, write the report and print the ending; returns the exit code."""
    from moestro.parallel import world
    from moestro.report import write_report
    from moestro.training.loop import train as run_training

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


def choose_tree(
    preset: str | None, config: Path | None, depth: int | None, start: str | None, data: str | None
) -> tuple[dict[str, Any], str]:
    """The raw configuration that the flags name, and a name for the run."""
    if sum(choice is not None for choice in (preset, config, depth)) > 1:
        raise ConfigError("give one of --preset, --config and --depth")
    tree, name = load_preset(preset or "demo"), preset or "demo"
    if config is not None:
        tree, name = load_file(config), config.stem
    elif depth is not None:
        tree, name = tree_of_depth(depth), f"depth-{depth}"
    if start is not None:
        if not (preset or config or depth):  # the demo's time is none to train a given model for
            tree = set_train(tree, {"minutes": DEFAULT_MINUTES})
        return tree, Path(os.path.abspath(start)).name
    return tree, name if data is None else Path(os.path.abspath(data)).stem or name  # .. is not the name of a folder


def free_directory(parent: Path, name: str, resume: bool) -> Path:
    """parent/name if it is free or with --resume, else the first of name-2, name-3, … that is free."""
    run, number = parent / name, 1
    while not resume and (run / SETTINGS).exists():
        number += 1
        run = parent / f"{name}-{number}"
    return run


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
        print(printable_lines(f"{sample['prompt'].strip()} ▸{sample['text'].rstrip()}"))
    print(f"\nTrained {outcome.step} steps. The report is {report}: open it in a browser. Next:")
    for words in (("chat", run), ("generate", run, "Once upon a time"), ("eval", run, "--json")):
        print(f"  {format_command(*words)}")
