"""Every figure of a report as an SVG and a table of numbers (CSV), for the page's buttons and for files.

A name is that of the figure on the page; both texts come from the same numbers that the page draws.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moestro.errors import MoestroError
from moestro.report.svg import draw_lines, draw_map
from moestro.training.metrics import write_atomic

PAGE_BYTES = 400_000  # of one figure's two texts; the files of larger ones are written by the command line alone

Record = dict[str, Any]


class Export(NamedTuple):
    """A figure's texts."""

    svg: str
    csv: str


def export_run(figures: Mapping[str, Any]) -> dict[str, Export]:
    """The figures of a run, as `html.collect_figures` gives them."""
    exports = {name: export_chart(chart) for name, chart in figures["charts"].items()}
    if loads := figures.get("loads"):
        exports["loads"] = export_loads(loads)
    if domains := figures.get("domains"):
        exports["domains"] = export_domains(domains)
    if biases := figures.get("biases"):
        exports["biases"] = export_biases(biases)
    return exports


def export_comparison(figures: Mapping[str, Any]) -> dict[str, Export]:
    """The figures of a comparison: curves by axis, and dots by key."""
    exports = {
        f"curves-{axis}": export_chart(
            chart | {"title": "Learning curves", "x": chart["unit"], "unit": "bits per byte"}
        )
        for axis, chart in figures["curves"].items()
    }
    for name, figure in figures["dots"].items():
        lines = [
            {
                "label": row["label"],
                "role": "cell",
                "dots": True,
                "color": row["color"],
                "x": [dot["seed"] for dot in row["dots"]],
                "y": [dot["value"] for dot in row["dots"]],
            }
            for row in figure["rows"]
        ]
        exports[name] = export_chart(figure | {"x": "seed", "lines": lines})
    return exports


def export_chart(chart: Record) -> Export:
    """A chart of lines: a row for every point, with the smallest and largest value where points were merged."""
    x = chart.get("x", "tokens trained")
    rows: list[Sequence[Any]] = [("line", x, chart["unit"], "lowest", "highest")]
    for line in chart["lines"]:
        bands = [line.get(key) or [None] * len(line["x"]) for key in ("low", "high")]
        rows += [(line["label"], *values) for values in zip(line["x"], line["y"], *bands, strict=True)]
    return Export(draw_lines(chart), to_csv(rows))


def export_loads(loads: Record) -> Export:
    """The last frame as a map; every frame in the table."""
    layers, experts = loads["layers"], loads["experts"]
    shape = (len(loads["steps"]), len(layers), experts)
    ratios = _decode(loads["ratios"], "<u2").reshape(shape) / loads["unit"]
    rows: list[Sequence[Any]] = [("first step", "last step", "layer", "expert", "load / mean")]
    for (first, last), frame in zip(loads["steps"], ratios, strict=True):
        rows += [(first, last, layers[at], e, f"{frame[at, e]:.4g}") for at, e in np.ndindex(shape[1:])]
    title = f"Load of every expert, steps {loads['steps'][-1][0]:,} to {loads['steps'][-1][1]:,}"
    return Export(draw_map(title, layers, _log2(ratios[-1]), ("expert", "layer")), to_csv(rows))


def export_domains(domains: Record) -> Export:
    """The last main layer as a map; every layer in the table."""
    names, layers, experts = domains["names"], domains["layers"], domains["experts"]
    shape = (len(names), len(layers), experts)
    log2 = _decode(domains["log2"], "<i2").reshape(shape) / 1000
    counts = _decode(domains["counts"], "<u4").reshape(shape)
    rows: list[Sequence[Any]] = [("domain", "layer", "expert", "log2 of share / mean", "assignments")]
    rows += [(names[d], layers[at], e, log2[d, at, e], counts[d, at, e]) for d, at, e in np.ndindex(shape)]
    shown = max([index for index, name in enumerate(layers) if name.isdecimal()], default=0)
    seen = np.where(counts[:, shown].any(axis=0), log2[:, shown], np.nan)
    title = f"Preference of experts for domains, layer {layers[shown]}, step {domains['step']:,}"
    return Export(draw_map(title, names, seen, ("expert", "domain")), to_csv(rows))


def export_biases(biases: Record) -> Export:
    """The first layer's experts as lines; every layer in the table."""
    layers, experts, tokens = biases["layers"], biases["experts"], biases["tokens"]
    shape = (len(layers), experts, len(tokens))
    low, high = (np.array(biases[key])[:, None, None] for key in ("low", "high"))
    values = low + _decode(biases["values"], "<u2").reshape(shape) / 65535 * (high - low)
    rows: list[Sequence[Any]] = [("layer", "expert", "tokens trained", "bias")]
    rows += [(layers[at], e, tokens[p], f"{values[at, e, p]:.6g}") for at, e, p in np.ndindex(shape)]
    lines = [
        {"label": f"expert {e}", "role": "plain", "color": e, "x": tokens, "y": values[0, e].tolist()}
        for e in range(experts)
    ]
    chart = {"title": f"Router biases, layer {layers[0]}", "unit": "bias added to the score", "lines": lines}
    return Export(draw_lines(chart), to_csv(rows))


def for_page(exports: Mapping[str, Export]) -> dict[str, Record]:
    """What the page's buttons hand out; a figure that is too large is left out."""
    sizes = {name: len(export.svg) + len(export.csv) for name, export in exports.items()}
    return {name: export._asdict() for name, export in exports.items() if sizes[name] <= PAGE_BYTES}


def write_figures(exports: Mapping[str, Export], folder: Path) -> list[Path]:
    """Write FOLDER/NAME.svg and NAME.csv of every figure; returns the paths. MoestroError if it cannot be written."""
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, export in exports.items():
            for kind, text in export._asdict().items():
                paths.append(folder / f"{name}.{kind}")
                write_atomic(paths[-1], text.encode("utf-8", "replace"))
    except OSError as error:
        raise MoestroError(f"cannot write figures to {folder}: {error.strerror or error}") from error
    return paths


def to_csv(rows: Sequence[Sequence[Any]]) -> str:
    """RFC 4180 with a line of names; a text that a spreadsheet would take for a formula gets an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerows([[_guard(value) for value in row] for row in rows])
    return stream.getvalue()


def _guard(value: Any) -> Any:
    return (
        f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") and not _is_number(value) else value
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _log2(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log2(np.where(ratio > 0, ratio, np.nan))


def _decode(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype)
