"""The figures of a comparison: learning curves and one dot a seed, as JSON for the page.

Only finished runs are drawn. A cell has the same colour everywhere, given by its place in the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moestro.compare.results import FINISHED, half_interval
from moestro.report.lines import Floats, column, to_plain

GRID_POINTS = 120
AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
# key of a dot plot: title, digits, and what its numbers mean
DOTS: dict[str, dict[str, Any]] = {
    "bits_per_byte": {
        "title": "Bits per byte at the end of a run",
        "unit": "bits per byte",
        "digits": 4,
        "zero": False,
        "percent": False,
    },
    "max_vio_batch": {
        "title": "MaxVio of a batch",
        "unit": "busiest load / mean − 1",
        "digits": 2,
        "zero": True,
        "percent": False,
    },
    "max_vio_global": {
        "title": "MaxVio over all held-out text",
        "unit": "busiest load / mean − 1",
        "digits": 2,
        "zero": True,
        "percent": False,
    },
    "dropped": {"title": "Dropped choices", "unit": "share of choices", "digits": 2, "zero": True, "percent": True},
}

Record = dict[str, Any]
Runs = Mapping[str, Sequence[Record]]  # finished records of every label, in the order of the cells


def finished_runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The finished records of every label, including labels without any."""
    runs: dict[str, list[Record]] = {record["label"]: [] for record in records}
    for record in records:
        if record["status"] == FINISHED:
            runs[record["label"]].append(record)
    return runs


def learning_curves(runs: Runs) -> dict[str, Record]:
    """For tokens, FLOPs and seconds: one line a cell, the mean of its seeds in a band from lowest to highest."""
    charts = {}
    for axis, unit in AXES.items():
        lines = [
            {"label": label, "role": "cell", "color": index, **line}
            for index, (label, records) in enumerate(runs.items())
            if (line := merge_curves([record["curve"] for record in records], axis))
        ]
        charts[axis] = {"unit": unit, "lines": lines}
    return charts if charts["tokens"]["lines"] else {}


def merge_curves(curves: Sequence[Mapping[str, Any]], axis: str) -> Record | None:
    """Mean, smallest and largest value of several curves at points that all of them cover; None without any.

    Curves are straight lines between their points. Curves with the same points keep them; others are read on a
    grid over their common range, so that every mean is over the same seeds. Curves without a common range become
    one point at their ends.
    """
    points = [clean for curve in curves if len((clean := _finite_points(curve, axis))[0])]
    if not points:
        return None
    first, last = max(x[0] for x, _ in points), min(x[-1] for x, _ in points)
    if all(np.array_equal(x, points[0][0]) for x, _ in points):
        grid, values = points[0][0], np.stack([y for _, y in points])
    elif first < last:
        grid = np.linspace(first, last, GRID_POINTS)
        values = np.stack([np.interp(grid, x, y) for x, y in points])
    else:
        grid = np.array([np.mean([x[-1] for x, _ in points])])
        values = np.array([[y[-1]] for _, y in points])
    line = {"x": to_plain(grid, 12), "y": to_plain(values.mean(axis=0), 6)}
    if len(points) == 1:
        return line
    return line | {"low": to_plain(values.min(axis=0), 6), "high": to_plain(values.max(axis=0), 6)}


def _finite_points(curve: Mapping[str, Any], axis: str) -> tuple[Floats, Floats]:
    """x and y of a curve in rising order of x, without points at which any column is missing.

    So a cell has points on every axis or on none.
    """
    names = (*AXES, "bits_per_byte")
    points = [dict(zip(names, values, strict=True)) for values in zip(*(curve[name] for name in names), strict=True)]
    table = np.stack([column(points, name) for name in names])
    known = table[:, np.isfinite(table).all(axis=0)]
    x, y = known[names.index(axis)], known[-1]
    order = np.argsort(x, kind="stable")
    return x[order], y[order]


def dot_figures(runs: Runs) -> dict[str, Record]:
    """The dot plots of `DOTS` that have anything to show; a figure whose values are all 0 is left out.

    A row is a cell with at least one value: its dots, their mean and, only for bits per byte, the interval of the
    mean.
    """
    figures = {}
    for key, style in DOTS.items():
        rows = [_dot_row(records, key, index) for index, records in enumerate(runs.values())]
        drawn = [row for row in rows if row is not None]
        if any(dot["value"] for row in drawn for dot in row["dots"]):
            figures[key] = {**style, "rows": drawn}
    return figures


def _dot_row(records: Sequence[Record], key: str, color: int) -> Record | None:
    known = [record for record in records if np.isfinite(column([record], key)[0])]
    if not known:
        return None
    values = [float(record[key]) for record in known]
    mean = float(np.mean(values))
    dots = [{"seed": record["seed"], "value": value} for record, value in zip(known, values, strict=True)]
    row = {"label": known[0]["label"], "color": color, "dots": dots, "mean": mean, "interval": None}
    half = half_interval(values)
    if key == "bits_per_byte" and half is not None:
        row["interval"] = [mean - half, mean + half]
    return row
