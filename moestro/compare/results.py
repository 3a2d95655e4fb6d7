"""Results of a comparison: one record per run, and per cell means, paired differences and costs to a target.

    DIR/results.jsonl    one record per cell and seed, in that order; `collect` makes them from the run directories

Runs of one seed see the same data in the same order, so cells are compared by differences between runs of equal
seed; these vary less than the runs do. Intervals are Student's t at 95%: with three seeds ± 4.3 standard errors. They
say how well the mean over seeds is known, nothing about other data, sizes or learning rates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np

from moestro.compare.cells import Cell, parse_cells, token_flops, training_cost
from moestro.config import Config, build_config, load_file
from moestro.errors import MoestroError
from moestro.model.size import cache_bytes_per_token, measure_size
from moestro.routing import stats
from moestro.training.metrics import read_domain_loads, read_evals, read_final_evals, read_metrics, write_atomic

RESULTS = "results.jsonl"
REQUEST = "compare.json"
REQUEST_VERSION = 1

Record = dict[str, Any]
Value = Callable[[Mapping[str, Any]], float | None]

FINISHED, FAILED, STOPPED, WAITING = "finished", "failed", "stopped", "waiting"
ROUTING_FIGURES = (
    *("max_vio_batch", "max_vio_global", "max_over_mean", "load_cv", "entropy", "dead_experts", "dropped"),
    "mtp_agreement",
)
FIGURES = ("steps", "tokens", "seconds", "tokens_per_second", "bits_per_byte", "loss", *ROUTING_FIGURES)
AXES = ("tokens", "seconds", "flops")
NOTHING: Record = dict.fromkeys((*FIGURES, "domains", "curve"))
# quantiles of Student's t at 0.975 for 1 to 30 degrees of freedom
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL_975 = 1.96


@dataclass(frozen=True)
class Estimate:
    """Mean over n runs and their standard deviation (n − 1), None for a single run."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences with its 95% interval; a single pair has no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class CellSummary:
    """One cell over its finished runs. `record` is its first record, for values that do not depend on the seed.

    `figures` and `domains` hold whatever at least one finished run has. `difference` is in bits per byte, this cell
    minus the baseline, None for the baseline. `to_target` is the cost until the summary's target by `AXES`, over the
    runs that reach it: compare its n.
    """

    label: str
    record: Record
    finished: int
    failed: int
    figures: dict[str, Estimate]
    domains: dict[str, Estimate]
    difference: Difference | None
    to_target: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """All cells in order; `target` in bits per byte is the worst mean end of a curve, None without results."""

    baseline: str
    target: float | None
    cells: tuple[CellSummary, ...]


@dataclass(frozen=True)
class Verdict:
    """The best cell by an axis: least bits per byte if every cell got the same amount, else first to the target.

    `difference` is `label` minus `second`, paired by seed; both are None if only one cell has figures.
    """

    axis: Literal["tokens", "seconds", "flops"]
    measure: Literal["bits_per_byte", "to_target"]
    label: str
    value: float
    second: str | None
    difference: Difference | None


# ---- records ----


def run_path(directory: Path, cell: Cell, seed: int) -> Path:
    """The run directory; beside it lie its configuration (.json) and its process's output (.log)."""
    return directory / "cells" / cell.slug / f"seed-{seed}"


def collect(directory: Path) -> list[Record]:
    """A record for every run of the comparison, in the order of cells, then seeds, from the files on disk."""
    request = load_file(directory / REQUEST)
    return [collect_run(directory, cell, seed) for cell in parse_cells(request["routers"]) for seed in request["seeds"]]


def collect_run(directory: Path, cell: Cell, seed: int, error: str | None = None) -> Record:
    """The record of one run; `error` is why it failed. An unfinished run has its figures so far."""
    run = run_path(directory, cell, seed)
    config = build_config(load_file(run.with_suffix(".json")))
    cost = training_cost(config)
    figures = trained_figures(run, config, cost)
    if is_finished(run):
        status, error = FINISHED, None
    elif error is not None:
        status = FAILED
    else:
        status = STOPPED if figures else WAITING
    model, size = config.model, measure_size(config.model)
    return {
        "label": cell.label,
        "scheme": cell.scheme,
        "overrides": list(cell.overrides),
        "seed": seed,
        "status": status,
        "error": error,
        "run": run.relative_to(directory).as_posix(),
        "parameters": {"total": size.total, "active": size.active},
        "flops_per_token": token_flops(config),
        "training_flops_per_token": cost,
        "cache_bytes_per_token": cache_bytes_per_token(model)["bf16"],
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "num_shared_experts": model.num_shared_experts,
        "expert_dim": model.expert_dim,
        "dense_dim": model.dense_dim,
        **(NOTHING | figures),
    }


def is_finished(run: Path) -> bool:
    """Whether the run recorded that it reached its planned end."""
    path = run / "run.json"
    return path.exists() and load_file(path).get("finished") is True


def trained_figures(run: Path, config: Config, cost: int) -> Record:
    """Figures from the logs of a run; empty before its first step. `cost` is in FLOPs per trained token."""
    metrics = read_metrics(run)
    if not metrics:
        return {}
    tokens = np.diff([0, *(record["tokens"] for record in metrics)])
    seconds = np.cumsum(tokens / np.array([record["tokens_per_second"] for record in metrics]))
    place = {record["step"]: index for index, record in enumerate(metrics)}
    evals = [r for r in read_evals(run) if r["bits_per_byte"] is not None and r["step"] in place]
    at = [place[record["step"]] for record in evals]  # their own tokens and seconds count evaluation, too
    last: Record = next(reversed([*evals[-1:], *read_final_evals(run)]), {})
    tail = metrics[-max(len(metrics) // 5, 1) :]
    figures: Record = {
        "steps": metrics[-1]["step"],
        "tokens": metrics[-1]["tokens"],
        "seconds": float(seconds[-1]),
        "tokens_per_second": metrics[-1]["tokens"] / float(seconds[-1]),
        "bits_per_byte": last.get("bits_per_byte"),
        "loss": last.get("loss"),
        "domains": {name: domain["bits_per_byte"] for name, domain in last.get("domains", {}).items()},
        "mtp_agreement": _mean_of(tail, "mtp_agreement") if config.model.mtp_depth else None,
        "curve": {
            "tokens": [metrics[index]["tokens"] for index in at],
            "seconds": [float(seconds[index]) for index in at],
            "flops": [metrics[index]["tokens"] * cost for index in at],
            "bits_per_byte": [record["bits_per_byte"] for record in evals],
        },
    }
    if config.model.num_moe_layers:
        figures |= {"max_vio_batch": _mean_of(tail, "max_vio"), "dropped": _mean_of(tail, "dropped")}
        figures |= balance_figures(run)
    return figures


def balance_figures(run: Path) -> Record:
    """Balance over the whole of the last validation: loads summed over domains, then the mean over routers."""
    _, by_step = read_domain_loads(run)
    if not by_step:
        return {}
    loads = by_step[max(by_step)].sum(axis=0, dtype=np.float64)  # [L, E]
    loads = loads[loads.sum(axis=1) > 0]
    if not len(loads):
        return {}
    return {
        "max_vio_global": float(stats.max_vio(loads).mean()),
        "max_over_mean": float(stats.max_over_mean(loads).mean()),
        "load_cv": float((loads.std(axis=1) / loads.mean(axis=1)).mean()),
        "entropy": float(stats.load_entropy(loads).mean()),
        "dead_experts": int(stats.dead_experts(loads).sum()),
    }


def _mean_of(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record[key] is not None]
    return fmean(values) if values else None


def write_results(directory: Path, records: Iterable[Record]) -> None:
    """Replace DIR/results.jsonl as a whole."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_atomic(directory / RESULTS, "".join(lines).encode())


def read_results(directory: Path) -> list[Record]:
    """The records of DIR/results.jsonl; raises `MoestroError` if there are none or a line is damaged."""
    path = directory / RESULTS
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError as error:
        raise MoestroError(f"{directory} holds no comparison: it has no {RESULTS}") from error
    except ValueError as error:
        raise MoestroError(f"{path} is damaged ({error}); moestro compare writes it again") from error


# ---- statistics ----


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard deviation of at least one value."""
    return Estimate(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def half_interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% interval of the mean, t · sd / √n; None for a single value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    quantile = T_975[freedom - 1] if freedom <= len(T_975) else NORMAL_975
    return quantile * stdev(values) / math.sqrt(len(values))


def paired_difference(records: Iterable[Record], label: str, other: str, value: Value) -> Difference | None:
    """`label` minus `other` over the seeds that both finished; None if there is no such seed."""
    by_label: dict[str, dict[int, float]] = {label: {}, other: {}}
    for record in records:
        number = value(record) if record["status"] == FINISHED and record["label"] in by_label else None
        if number is not None:
            by_label[record["label"]][record["seed"]] = number
    ours, theirs = by_label[label], by_label[other]
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean, half = fmean(differences), half_interval(differences)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Difference(mean, low, high, len(differences))


def cost_to_target(curve: Mapping[str, Sequence[float]], axis: str, target: float) -> float | None:
    """Where the curve first reaches `target` bits per byte, interpolated linearly between evaluations.

    The first evaluation, if it is already below; None if no evaluation is.
    """
    x, y = curve[axis], curve["bits_per_byte"]
    for index, bits in enumerate(y):
        if bits > target:
            continue
        if index == 0:
            return x[0]
        share = (y[index - 1] - target) / (y[index - 1] - bits)
        return x[index - 1] + share * (x[index] - x[index - 1])
    return None


def summarise(records: Sequence[Record], baseline: str | None = None) -> Summary:
    """Every cell over its finished runs; differences are to `baseline`, by default the first cell."""
    labels = list(dict.fromkeys(record["label"] for record in records))
    if not labels:
        raise MoestroError("there are no runs to summarise")
    first = labels[0] if baseline is None else baseline
    if first not in labels:
        raise MoestroError(f"no cell is called '{first}'; there are: {', '.join(labels)}")
    target = target_level(records)
    return Summary(first, target, tuple(_summarise_cell(records, label, first, target) for label in labels))


def target_level(records: Iterable[Record]) -> float | None:
    """The worst mean of the last points of the curves among the cells: a level that every cell reaches on average."""
    return max(_curve_ends(records).values(), default=None)


def _summarise_cell(records: Sequence[Record], label: str, baseline: str, target: float | None) -> CellSummary:
    own = [record for record in records if record["label"] == label]
    finished = [record for record in own if record["status"] == FINISHED]
    domains = dict.fromkeys(name for record in finished for name in record["domains"])
    costs = {axis: _numbers(finished, _to_target(axis, target)) for axis in AXES}
    return CellSummary(
        label=label,
        record=own[0],
        finished=len(finished),
        failed=sum(record["status"] == FAILED for record in own),
        figures=_estimates({key: _numbers(finished, _figure(key)) for key in FIGURES}),
        domains=_estimates({name: _numbers(finished, _domain(name)) for name in domains}),
        difference=None if label == baseline else paired_difference(records, label, baseline, bits_per_byte),
        to_target=_estimates(costs),
    )


def verdicts(records: Sequence[Record], budget: str) -> list[Verdict]:
    """The best cells by tokens and by seconds, and by FLOPs if that is the kind of `budget`; empty without figures.

    If cells got unequal amounts of an axis, the cost until the target decides. The axis is left out if runs of cells
    other than the worst miss the target: seeds then differ more than cells, and the first place is chance.
    """
    axes: list[Literal["tokens", "seconds", "flops"]] = ["tokens", "seconds"]
    if budget == "flops":
        axes.insert(0, "flops")
    target = target_level(records)
    found = []
    for axis in axes:
        equal = axis == budget
        value = bits_per_byte if equal else _to_target(axis, target)
        verdict = _least(records, value)
        if verdict is not None:
            found.append(Verdict(axis, "bits_per_byte" if equal else "to_target", *verdict))
    return found


def _least(records: Sequence[Record], value: Value) -> tuple[str, float, str | None, Difference | None] | None:
    """The cell with the least mean, that mean, the next cell, and their paired difference; see `verdicts`."""
    numbers = _by_cell(records, value)
    finals = _curve_ends(records)
    whole = {label: [n for n in values if n is not None] for label, values in numbers.items() if None not in values}
    ranked = sorted((fmean(values), label) for label, values in whole.items())
    if not ranked or numbers.keys() - whole.keys() - {max(finals, key=lambda label: finals[label])}:
        return None
    (mean, best), *others = ranked
    second = others[0][1] if others else None
    return best, mean, second, paired_difference(records, best, second, value) if second is not None else None


def _curve_ends(records: Iterable[Record]) -> dict[str, float]:
    """Mean over seeds of the last point of the curve, by label: on the text of every other point, unlike the final."""
    ends = _by_cell(records, lambda record: next(reversed(record["curve"]["bits_per_byte"]), None))
    return {label: fmean(known) for label, values in ends.items() if (known := [n for n in values if n is not None])}


def _by_cell(records: Iterable[Record], value: Value) -> dict[str, list[float | None]]:
    """The value of every finished run that was evaluated, by label."""
    found: dict[str, list[float | None]] = {}
    for record in records:
        if record["status"] == FINISHED and record["bits_per_byte"] is not None:
            found.setdefault(record["label"], []).append(value(record))
    return found


def bits_per_byte(record: Mapping[str, Any]) -> float | None:
    """The final bits per byte of a run."""
    return record["bits_per_byte"]


def _figure(key: str) -> Value:
    return lambda record: record[key]


def _domain(name: str) -> Value:
    return lambda record: record["domains"].get(name)


def _to_target(axis: str, target: float | None) -> Value:
    return lambda record: None if target is None else cost_to_target(record["curve"], axis, target)


def _numbers(records: Iterable[Record], value: Value) -> list[float]:
    numbers = (value(record) for record in records)
    return [number for number in numbers if number is not None]


def _estimates(values: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
    return {key: estimate(numbers) for key, numbers in values.items() if numbers}
