"""A whole comparison as one call: plan, train, summarise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moestro.compare.plan import Plan, make_plan, prepare_directory
from moestro.compare.results import FAILED, FINISHED, RESULTS, Record, Summary, Verdict, summarise, verdicts
from moestro.compare.runner import Runner
from moestro.config import load_preset, quote_value
from moestro.training.ownership import own_directory
from moestro.training.progress import format_duration


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found: a record of every run, a summary of every cell, the best cell by each axis.

    `stopped_by` is the signal that ended it early; the same call then goes on.
    """

    directory: Path
    records: list[Record]
    summary: Summary
    verdicts: list[Verdict]
    stopped_by: int | None = None

    @property
    def num_finished(self) -> int:
        """Runs that were trained to their end."""
        return sum(record["status"] == FINISHED for record in self.records)

    @property
    def num_failed(self) -> int:
        """Runs that broke; the same call tries them again."""
        return sum(record["status"] == FAILED for record in self.records)


def compare(
    routers: str,
    out: str | Path,
    *,
    seeds: int = 3,
    budget: str = "5m",
    equal: str | None = None,
    preset: str = "compare",
    data: str | None = None,
    settings: Sequence[str] = (),
    expansion: int = 8,
    jobs: int = 1,
    log: Callable[[str], None] = print,
) -> Comparison:
    """Train router schemes at equal FLOPs per token on the same data, over several seeds, and compare them.

    `routers` are cells, separated by commas, such as "dense,switch,v3=deepseek-v3". `budget` is what each run gets: a
    time such as "10m", or tokens such as "2Mtok". `settings` are changes of the base for all cells, as
    "section.key=value". `log` gets a line for every run. A call for the same `out` goes on, and may add cells and
    seeds. ConfigError for what cannot be run.
    """
    source = [] if data is None else [f"data.source={quote_value(data)}"]
    plan = make_plan(
        Path(out),
        routers,
        load_preset(preset),
        [*source, *settings],
        preset=preset,
        seeds=seeds,
        budget=budget,
        equal=equal,
        expansion=expansion,
        jobs=jobs,
    )
    return run_plan(plan, "moestro.compare(...)", log)


def run_plan(plan: Plan, command: str, log: Callable[[str], None]) -> Comparison:
    """Train what is unfinished; `command` is kept as what was asked, `log` gets a line for every run that has ended."""
    with own_directory(plan.directory, lambda directory: (directory / RESULTS).exists()):
        prepare_directory(plan, command, log)
        runner = Runner(plan, report=lambda record: log(describe_run(record) + describe_rest(runner)))
        signal = runner.run()
    records = list(runner.records.values())
    return Comparison(plan.directory, records, summarise(records), verdicts(records, plan.budget.kind), signal)


def describe_rest(runner: Runner) -> str:
    """How many runs are left and for how long, once a run has finished."""
    seconds, runs = runner.seconds_left(), len(runner.queue) + len(runner.running)
    return f" ({runs} left, about {format_duration(seconds)})" if seconds is not None and runs else ""


def describe_run(record: Record) -> str:
    """One line on how a run ended."""
    name = f"{record['label']}, seed {record['seed']}"
    if record["error"] is not None:
        return f"{name} failed: {record['error']}"
    if record["status"] != FINISHED:
        return f"{name} stopped at step {record['steps'] or 0}"
    bits = "no held-out text" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.4f} bits per byte"
    return f"{name}: {bits}, {record['tokens']:,} tokens in {format_duration(record['seconds'])}"
