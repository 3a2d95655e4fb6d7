"""The headline numbers of a report, and how counts and times are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moestro.report.lines import column

Record = dict[str, Any]
UNKNOWN = "–"


class Tile(NamedTuple):
    """One headline number; `note` says what it was computed from."""

    label: str
    value: str
    note: str


def headline(about: Record, steps: Sequence[Record], evals: Sequence[Record]) -> list[Tile]:
    """The tiles: model, tokens, quality, time, speed, balance. Unknown values are a dash."""
    last = steps[-1] if steps else {}
    tail = steps[-max(1, len(steps) // 10) :]
    latest = max(evals, key=lambda record: record["step"], default={}) if evals else {}
    latest = evals[-1] if evals and evals[-1]["step"] == latest["step"] else latest  # a final one stands last
    parameters = about.get("parameters") or {}
    vio, speed = column(tail, "max_vio"), column(steps, "tokens_per_second")
    window = f"mean of the last {len(tail)} steps, each one batch" if len(tail) > 1 else "last batch"
    text = "all held-out text" if latest.get("final") else "validation"
    evaluated = f"{text}, step {latest['step']:,}" if latest else "no evaluation yet"
    return [
        Tile("Parameters", format_count(parameters.get("total")), _active(parameters)),
        Tile("Tokens", format_count(last.get("tokens")), f"{last['step']:,} steps" if last else "no step yet"),
        Tile("Bits per byte", _decimal(latest.get("bits_per_byte"), 3), evaluated),
        Tile("Training time", format_seconds(last.get("seconds")), "evaluation and saving included"),
        Tile("Tokens per second", format_count(_finite_reduce(np.median, speed)), "median of steps"),
        Tile("MaxVio", _decimal(_finite_reduce(np.mean, vio), 2), window),
        Tile("Dead experts", _decimal(last.get("dead_experts"), 0), "no token in the last batch"),
    ]


def format_count(value: Any) -> str:
    """12345678 as 12.3M, with three significant digits from a thousand on."""
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        return UNKNOWN
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.{max(0, 2 - int(np.log10(abs(scaled) + 0.005)))}f}{letter}"
    return f"{value:,.0f}"


def format_seconds(value: Any) -> str:
    """Seconds as the two largest units: 4 min 12 s, 3 h 05 min."""
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        return UNKNOWN
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _active(parameters: Record) -> str:
    active = parameters.get("active")
    return f"{format_count(active)} active for a token" if active else "not recorded"


def _decimal(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) and np.isfinite(value) else UNKNOWN


def _finite_reduce(reduce: Any, values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if finite.size else float("nan")
