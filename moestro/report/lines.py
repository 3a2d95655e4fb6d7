"""The line charts of a report: metrics and evaluations over tokens, as JSON for the page.

A line keeps at most `MAX_POINTS` points. Longer lines are cut into equal runs of steps: a point is the mean of
its run, and a band spans smallest to largest, so that no spike is hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.routing import stats

MAX_POINTS = 400
CHUNK = 64  # routing records read at once

Record = dict[str, Any]
Floats = NDArray[np.float64]


def column(records: Sequence[Record], key: str) -> Floats:
    """A key's value in every record; NaN where it is null, missing or not a number."""
    values = (record.get(key) for record in records)
    return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], np.float64)


def downsample(x: Floats, y: Floats, limit: int = MAX_POINTS) -> dict[str, list[float | None]]:
    """`{x, y}` of at most `limit` points, with `{low, high}` when points had to be merged."""
    if len(x) <= limit:
        return {"x": to_plain(x, 12), "y": to_plain(y)}
    edges = np.linspace(0, len(x), limit + 1).astype(int)
    parts = [y[start:stop] for start, stop in itertools.pairwise(edges)]
    finite = [part[np.isfinite(part)] for part in parts]
    reduced = {
        name: np.array([reduce(part) if part.size else np.nan for part in finite])
        for name, reduce in (("y", np.mean), ("low", np.min), ("high", np.max))
    }
    return {"x": to_plain(x[edges[1:] - 1], 12)} | {name: to_plain(values) for name, values in reduced.items()}


def line(label: str, x: Floats, y: Floats, role: str = "plain", color: int = 0) -> list[Record]:
    """A list of one chart line, empty if the line has no finite value.

    Roles: `plain` (a colour by number), `train` (behind the others), `total`, `final` and `domain` (points, no band).
    """
    if not np.isfinite(y).any():
        return []
    data = downsample(x, y)
    if role in ("total", "final", "domain"):
        data = {"x": data["x"], "y": data["y"]}
    return [{"label": label, "role": role, "color": color, **data}]


def quality_charts(metrics: Sequence[Record], evals: Sequence[Record]) -> dict[str, Record]:
    """Bits per byte and loss: training behind, validation total and every domain in front."""
    tokens = column(metrics, "tokens")
    domains = domain_names(evals)

    final = [record for record in evals if record.get("final")]
    points = [record for record in evals if not record.get("final")]
    eval_tokens, final_tokens = column(points, "tokens"), column(final, "tokens")

    def chart(title: str, unit: str, train_key: str, key: str) -> Record:
        lines = line("training batch", tokens, column(metrics, train_key), "train")
        lines += line("validation", eval_tokens, column(points, key), "total")
        lines += line("final, all held-out text", final_tokens, column(final, key), "final")
        for color, name in enumerate(domains):
            records = [_domain(record, name) for record in points]
            lines += line(name, eval_tokens, column(records, key), "domain", color)
        return {"title": title, "unit": unit, "lines": lines}

    return {
        "bits": chart("Bits per byte", "bits per byte", "bits_per_byte", "bits_per_byte"),
        "loss": chart("Loss of the next token", "nats per token", "loss_main", "loss"),
    }


def optimisation_charts(metrics: Sequence[Record]) -> dict[str, Record]:
    """Throughput, learning rate, gradient norm, and what the MTP block learns."""
    tokens = column(metrics, "tokens")
    charts: dict[str, Record] = {}
    for key, title, unit, color in (
        ("tokens_per_second", "Speed of training", "tokens per second", 2),
        ("lr", "Learning rate", "learning rate", 0),
        ("grad_norm", "Gradient norm before clipping", "length of the gradient", 1),
    ):
        charts[key] = {"title": title, "unit": unit, "lines": line(title, tokens, column(metrics, key), color=color)}
    mtp_loss, agreement = column(metrics, "loss_mtp"), column(metrics, "mtp_agreement")
    if np.nan_to_num(mtp_loss).any():
        main = line("next token", tokens, column(metrics, "loss_main"), "train")
        lines = main + line("token after next", tokens, mtp_loss, color=0)
        charts["loss_mtp"] = {"title": "MTP loss", "unit": "nats per token", "lines": lines}
        lines = line("agreement", tokens, agreement, color=2)
        charts["mtp_agreement"] = {"title": "MTP agreement", "unit": "share of tokens", "lines": lines, "percent": True}
    return charts


def balance_charts(metrics: Sequence[Record], routing: NDArray[np.void], tokens: Floats) -> dict[str, Record]:
    """MaxVio, entropy and dead experts of every step's loads; `tokens` [S] go with the routing records."""
    if len(routing) == 0:
        return {}
    parts = [routing["loads"][start : start + CHUNK] for start in range(0, len(routing), CHUNK)]
    vio = np.concatenate([stats.max_vio(part) for part in parts])
    entropy = np.concatenate([stats.load_entropy(part) for part in parts])
    dead = np.concatenate([stats.dead_experts(part) for part in parts]).sum(axis=1).astype(np.float64)
    routed = np.isfinite(vio).any(axis=1)
    x, vio, entropy = tokens[routed], vio[routed], entropy[routed]
    if not routed.any():
        return {}

    def layers(values: Floats, worst: Floats) -> list[Record]:
        return line("worst layer", x, worst, "train") + line("mean of layers", x, np.nanmean(values, axis=1))

    charts: dict[str, Record] = {
        "max_vio": {"title": "MaxVio", "unit": "busiest load / mean − 1", "lines": layers(vio, np.nanmax(vio, axis=1))},
        "entropy": {
            "title": "Load entropy",
            "unit": "share of the largest entropy",
            "lines": layers(entropy, np.nanmin(entropy, axis=1)),
        },
        "dead": {
            "title": "Experts without a token, all layers",
            "unit": "experts",
            "lines": line("dead", tokens, dead, color=1),
        },
    }
    loss = column(metrics, "loss_balance")
    if np.nan_to_num(loss).any():
        lines = line("balance loss", column(metrics, "tokens"), loss, color=3)
        charts["loss_balance"] = {"title": "Balance loss", "unit": "weighted, added to the loss", "lines": lines}
    return charts


def domain_names(evals: Sequence[Record]) -> list[str]:
    """Domains in the order in which the evaluations first name them."""
    return list(dict.fromkeys(name for record in evals for name in record.get("domains") or {}))


def _domain(record: Record, name: str) -> Record:
    domain: Record = (record.get("domains") or {}).get(name) or {}
    return domain


def to_plain(values: Floats, digits: int = 5) -> list[float | None]:
    """Numbers for JSON, rounded to significant digits; None for values that are not finite."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]
