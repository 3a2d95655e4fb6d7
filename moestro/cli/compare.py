"""`moestro compare`: compare routers at equal cost, over several seeds."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moestro.cli.hints import spell_commands
from moestro.cli.output import print_json, print_note
from moestro.config import load_preset, quote_value

if TYPE_CHECKING:
    from rich.table import Table

    from moestro.compare.plan import Plan
    from moestro.compare.results import CellSummary, Estimate, Summary

LARGEST_DEVIATION = 0.03  # how far FLOPs per token may differ from the base's before a warning
PLAIN_WIDTH = 160  # width of tables that do not go to a terminal


def compare(
    *,
    routers: str = "dense,switch,glam,deepseek-moe,deepseek-v3",
    seeds: int = 3,
    budget: str = "5m",
    equal: str | None = None,
    preset: str = "compare",
    data: str | None = None,
    settings: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    expansion: int = 8,
    jobs: int = 1,
    threads: int = 0,
    out: Path = Path("runs/compare"),
    dry_run: bool = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Train routers at equal cost on the same data and compare them.

    The same command continues a stopped comparison; cells and seeds may be added.

    Parameters
    ----------
    routers
        Cells, separated by commas: [label=]scheme[:key=value…]. A scheme is a shipped one or a .toml file; keys are
        those of [model], such as mha=deepseek-v3:attention=mha. Differences are relative to the first cell.
    seeds
        Runs per cell: seeds 0, 1, …; each decides the order of the data and the initial weights.
    budget
        Per run: 10m, 90s, 1h of training, or 500ktok, 20Mtok, 2Btok.
    equal
        What is equal among cells: seconds or tokens, as the budget says; or flops, with a budget in tokens.
    preset
        The base that cells share, as a dense model: its FLOPs per token are every cell's.
    data
        What to train on, as in moestro train; the same for all.
    settings
        Changes to the base for all cells, as section.key=value; may be repeated.
    expansion
        Ratio of all experts to the active ones.
    jobs
        How many runs to train at a time; each gets its share of the cores.
    threads
        Threads of each run; by default its share of the cores.
    out
        The directory of the comparison.
    dry_run
        Show the cells and stop.
    json_output
        Print the summary as one JSON object on the last line.
    """
    from moestro.compare.plan import make_plan

    overrides = [*([f"data.source={quote_value(data)}"] if data is not None else []), *settings]
    overrides += [f"train.threads={threads}"] if threads else []
    options: dict[str, Any] = {"seeds": seeds, "budget": budget, "equal": equal, "expansion": expansion, "jobs": jobs}
    plan = make_plan(out, routers, load_preset(preset), overrides, preset=preset, **options)
    print_cells(plan, dry_run=dry_run, json_output=json_output)
    return 0 if dry_run else run_and_show(plan, json_output=json_output)


def print_cells(plan: Plan, *, dry_run: bool, json_output: bool) -> None:
    """Print what every cell costs, and on standard error what may mislead; a dry run says how long it takes."""
    print_table(cells_table(plan), error=not dry_run)
    for warning in deviations(plan):
        print_note(warning)
    if not dry_run:
        return
    seconds = estimate_total(plan)
    print(total_text(plan, seconds))
    if json_output:
        cells = [describe_cell(plan, index) for index in range(len(plan.cells))]
        print_json({"cells": cells, "estimated_seconds": seconds})


def estimate_total(plan: Plan) -> float | None:
    """Seconds that all runs train, as `pace.estimate_seconds`, with the threads that a run gets."""
    from moestro import machine
    from moestro.compare.pace import estimate_seconds

    machine.use_threads(plan.threads)
    return estimate_seconds(plan)


def total_text(plan: Plan, seconds: float | None) -> str:
    """One line on how long a comparison takes."""
    from moestro.training.progress import format_duration

    runs = len(plan.cells) * len(plan.seeds)
    what = f"{runs} run{'s' if runs > 1 else ''}" + (f", {plan.jobs} at a time" if plan.jobs > 1 else "")
    if seconds is None:
        return f"{what}; the models are too large to measure a step of each beforehand"
    how = "the budget" if plan.budget.kind == "seconds" else "a measured step of each cell"
    return f"{what}: about {format_duration(seconds)} of training by {how}; evaluations and starts come on top"


def run_and_show(plan: Plan, *, json_output: bool) -> int:
    """Train, write the report and print the table; returns the exit code."""
    from moestro.compare.comparison import run_plan
    from moestro.report.comparison import sentences, write_comparison

    command = shlex.join(["moestro", *sys.argv[1:]])
    done = run_plan(plan, command, print_note)
    total, signal, summary, found = len(done.records), done.stopped_by, done.summary, done.verdicts
    finished, failed = done.num_finished, done.num_failed
    report = write_comparison(plan.directory)
    if finished:
        print_table(results_table(summary), error=False)
        print_table(balance_table(summary), error=False)
        print("\n".join([*sentences(found, summary), f"The report is {report}: open it in a browser."]))
    if failed:
        print_note(f"{failed} of {total} runs failed; the same command tries them again")
    if signal is not None:
        print_note(f"Stopped; {finished} of {total} runs are finished. Go on with:\n  {spell_commands(command)}")
    if json_output:
        print_json(
            {"out": str(plan.directory), "report": str(report), "runs": total, "finished": finished, "failed": failed,
             **asdict(summary), "verdicts": [asdict(verdict) for verdict in found]}
        )  # fmt: skip
    return 128 + signal if signal is not None else int(failed > 0)


def print_table(table: Table, *, error: bool) -> None:
    """Print a table on standard output, or on standard error to keep it apart from the results."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False).print(table)


def new_table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def describe_cell(plan: Plan, index: int) -> dict[str, Any]:
    """What is known about a cell before it is trained."""
    from moestro.compare.cells import token_flops, training_cost
    from moestro.model.size import cache_bytes_per_token, measure_size

    cell = plan.cells[index]
    model, size = cell.config.model, measure_size(cell.config.model)
    return {
        "label": cell.cell.label,
        "parameters": {"total": size.total, "active": size.active},
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "num_shared_experts": model.num_shared_experts,
        "expert_dim": model.expert_dim,
        "dense_dim": model.dense_dim,
        "flops_ratio": cell.flops_ratio,
        "flops_per_token": token_flops(cell.config),
        "training_flops_per_token": training_cost(cell.config),
        "cache_bytes_per_token": cache_bytes_per_token(model)["bf16"],
        "steps": plan.config(cell, 0).train.steps if plan.budget.kind != "seconds" else None,
    }


def cells_table(plan: Plan) -> Table:
    """Every cell with what it costs."""
    table = new_table("cell", "total", "active", "experts", "used", "width", "FLOPs", "cache B", "run")
    for index in range(len(plan.cells)):
        cell = describe_cell(plan, index)
        moe = cell["num_experts"] > 0
        table.add_row(
            plain(cell["label"]),
            f"{cell['parameters']['total'] / 1e6:.2f}M",
            f"{cell['parameters']['active'] / 1e6:.2f}M",
            str(cell["num_experts"]) if moe else "–",
            f"{cell['top_k']}+{cell['num_shared_experts']}" if moe else "–",
            str(cell["expert_dim"] if moe else cell["dense_dim"]),
            f"{cell['flops_ratio']:.3f}",
            f"{cell['cache_bytes_per_token']:,}",
            plan.budget.text if cell["steps"] is None else f"{cell['steps']:,} steps",
        )
    return table


def deviations(plan: Plan) -> list[str]:
    """A warning for every cell whose cost per token differs from the base's."""
    return [
        f"warning: a token of {cell.cell.label} costs {cell.flops_ratio:.3f} times what one of the base does; "
        "differences may come from that"
        for cell in plan.cells
        if abs(cell.flops_ratio - 1) > LARGEST_DEVIATION
    ]


def results_table(summary: Summary) -> Table:
    """The results of every cell's finished runs, as means over seeds."""
    target = "" if summary.target is None else f" to {summary.target:.3f}"
    table = new_table("cell", "seeds", "bits per byte", f"− {plain(summary.baseline)}, 95%", f"seconds{target}")
    for cell in summary.cells:
        figures = cell.figures
        table.add_row(
            plain(cell.label),
            f"{cell.finished}" + (f" ({cell.failed} failed)" if cell.failed else ""),
            spread(figures.get("bits_per_byte")),
            difference_text(cell),
            target_text(cell),
        )
    return table


def balance_table(summary: Summary) -> Table:
    """Speed, and how even the loads of every cell's experts are: MaxVio 0 and entropy 1 are perfectly even."""
    table = new_table("cell", "tokens/s", "MaxVio batch", "MaxVio all", "entropy", "dead", "dropped")
    for cell in summary.cells:
        figures = cell.figures
        table.add_row(
            plain(cell.label),
            mean_text(figures.get("tokens_per_second"), "{:,.0f}"),
            mean_text(figures.get("max_vio_batch"), "{:.2f}"),
            mean_text(figures.get("max_vio_global"), "{:.2f}"),
            mean_text(figures.get("entropy"), "{:.3f}"),
            mean_text(figures.get("dead_experts"), "{:.1f}"),
            mean_text(figures.get("dropped"), "{:.1%}"),
        )
    return table


def plain(text: str) -> str:
    """Text in which brackets are not read as markup."""
    from rich.markup import escape

    return escape(text)


def mean_text(estimate: Estimate | None, form: str) -> str:
    """The mean, or a dash if the cell has no such figure."""
    return "–" if estimate is None else form.format(estimate.mean)


def spread(estimate: Estimate | None) -> str:
    """Mean ± standard deviation over seeds."""
    if estimate is None:
        return "–"
    return f"{estimate.mean:.4f}" + ("" if estimate.sd is None else f" ± {estimate.sd:.4f}")


def difference_text(cell: CellSummary) -> str:
    """The difference from the baseline ± half its interval; a single seed has none."""
    difference = cell.difference
    if difference is None:
        return "–"
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f} (one seed)"
    return f"{difference.mean:+.4f} ± {(difference.high - difference.low) / 2:.4f}"


def target_text(cell: CellSummary) -> str:
    """Seconds until the target, and how many runs reach it if not all do."""
    estimate = cell.to_target.get("seconds")
    if estimate is None:
        return "–"
    return f"{estimate.mean:,.0f}" + ("" if estimate.n == cell.finished else f" ({estimate.n} of {cell.finished})")
