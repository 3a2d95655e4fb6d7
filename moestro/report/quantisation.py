"""What FP8 does to the numbers of a run, from its `fp8.jsonl`: a table by layer, and the errors over the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moestro.report.lines import column, line
from moestro.report.tiles import UNKNOWN

KINDS = ("weights", "inputs", "gradients")

Record = dict[str, Any]


class KindRow(NamedTuple):
    """One kind of numbers in one layer: means over its matrices, the worst of them, the range of all scales."""

    kind: str
    error: str
    worst: str
    zeros: str
    top: str
    scales: str


def fp8_charts(records: Sequence[Record]) -> dict[str, Record]:
    """The mean error of all matrices and the mean share of values that became 0, for each kind of numbers."""
    tokens = column(records, "tokens")

    def chart(title: str, key: str) -> Record:
        lines: list[Record] = []
        for color, kind in enumerate(KINDS):
            means = [
                mean([stats[key] for layer in record["layers"].values() for _, stats in of_kind(layer, kind)])
                for record in records
            ]
            lines += line(kind, tokens, np.array(means), "domain", color)
        return {"title": title, "unit": "share, in percent", "lines": lines, "percent": True}

    return {
        "fp8_error": chart("Mean quantisation error", "error"),
        "fp8_zeros": chart("Values that became 0", "zeros"),
    }


def fp8_table(record: Record) -> list[tuple[str, list[KindRow]]]:
    """One measurement as (layer, a row for each kind of numbers)."""
    return [(name, [_row(layer, kind) for kind in KINDS]) for name, layer in record["layers"].items()]


def of_kind(layer: Record, kind: str) -> Iterator[tuple[str, Record]]:
    """(matrix, its numbers) of one kind."""
    return ((name, matrix[kind]) for name, matrix in layer.items())


def mean(values: Sequence[float | None]) -> float:
    """Of the known values; NaN without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def format_share(value: float) -> str:
    """0.0261 as 2.6%, with two significant digits below ten percent."""
    if not math.isfinite(value):
        return UNKNOWN
    percent = 100 * value
    if 0 < percent < 0.001:
        return "<0.001%"
    digits = 0 if percent == 0 or percent >= 10 else min(1 - math.floor(math.log10(percent)), 3)
    return f"{percent:.{digits}f}%"


def format_scale(value: float) -> str:
    """0.000123 as 1.2e−4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def _row(layer: Record, kind: str) -> KindRow:
    known = [(name, stats) for name, stats in of_kind(layer, kind) if stats["error"] is not None]
    if not known:
        return KindRow(kind, *[UNKNOWN] * 5)
    error, zeros, top = (format_share(mean([stats[key] for _, stats in known])) for key in ("error", "zeros", "top"))
    worst, stats = max(known, key=lambda pair: pair[1]["error"])
    low, high = min(stats["low"] for _, stats in known), max(stats["high"] for _, stats in known)
    scales = format_scale(low) if low == high else f"{format_scale(low)} to {format_scale(high)}"
    return KindRow(kind, error, f"{format_share(stats['error'])} {worst}", zeros, top, scales)
