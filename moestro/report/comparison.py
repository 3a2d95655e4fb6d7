"""The report of a comparison: which cell has the fewest bits per byte, by which measure, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moestro.compare.results import (
    FAILED,
    FINISHED,
    REQUEST,
    REQUEST_VERSION,
    Summary,
    Verdict,
    read_results,
    summarise,
    verdicts,
)
from moestro.errors import MoestroError
from moestro.report import cell_figures, cell_tables
from moestro.report.cell_tables import duration, signed
from moestro.report.export import export_comparison, for_page, write_figures
from moestro.report.page import render_page, write_page
from moestro.report.tiles import Tile, format_count

STYLES = ("uPlot.min.css", "report.css", "comparison.css")
SCRIPTS = ("uPlot.iife.min.js", "charts.js", "maps.js", "download.js", "comparison.js")
EQUAL = {"tokens": "tokens", "seconds": "training time", "flops": "training FLOPs"}
MEASURES = {"tokens": "Counted in tokens", "seconds": "In wall clock", "flops": "Counted in training FLOPs"}

Record = dict[str, Any]


def write_comparison(directory: Path, out: Path | None = None) -> Path:
    """Write the report of the comparison in `directory` to `out` (default: report.html there).

    Reads only compare.json and results.jsonl; works while runs go on. Raises `MoestroError` if the folder holds no
    comparison, if files are damaged, and if `out` cannot be written.
    """
    return write_page(render(directory), directory / "report.html", out)


def render(directory: Path) -> str:
    """The page as text."""
    request = read_request(directory)
    records = read_results(directory)
    summary = summarise(records)
    figures = collect_figures(records)
    found = verdicts(records, request["budget"]["kind"])
    context = {
        "name": directory.resolve().name,
        "verdict": sentences(found, summary),
        "tiles": headline(request, records, summary),
        "figures": figures,
        "reference": summary.baseline,
        "target": None if summary.target is None else f"{summary.target:.4f}",
        "result": cell_tables.result_table(summary),
        "balance": cell_tables.balance_table(summary),
        "sizes": cell_tables.size_table(summary),
        "domains": cell_tables.domain_table(summary),
        "unfinished": cell_tables.unfinished_runs(records),
        "reading": reading(request, summary),
        "command": request["command"],
        "facts": facts(request),
        "settings": json.dumps(request["settings"], indent=2, ensure_ascii=False),
        "versions": None,
    }
    return render_page("comparison.html.j2", STYLES, SCRIPTS, figures, context)


def collect_figures(records: Sequence[Record]) -> Record:
    """Data of the figures, and the files that the page offers of them."""
    runs = cell_figures.finished_runs(records)
    figures = {"curves": cell_figures.learning_curves(runs), "dots": cell_figures.dot_figures(runs)}
    return figures | {"files": for_page(export_comparison(figures))}


def write_comparison_figures(directory: Path, folder: Path) -> list[Path]:
    """Write every figure of a comparison to `folder`, as SVG and CSV; returns the paths."""
    read_request(directory)
    return write_figures(export_comparison(collect_figures(read_results(directory))), folder)


def read_request(directory: Path) -> Record:
    """compare.json as it was written."""
    path = directory / REQUEST
    try:
        request = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MoestroError(f"{directory} holds no comparison: it has no {REQUEST}") from error
    except (OSError, ValueError) as error:
        raise MoestroError(f"{path} is damaged: {error}") from error
    if not isinstance(request, dict) or request.get("version") != REQUEST_VERSION:
        raise MoestroError(f"{path} is not a comparison of version {REQUEST_VERSION}")
    return request


def sentences(found: Sequence[Verdict], summary: Summary) -> list[str]:
    """Every verdict in words, and the axes that allow no verdict; for the page and for the terminal."""
    if summary.target is None:
        return ["No run has finished yet."]
    judged = {verdict.axis for verdict in found}
    return [sentence(verdict, summary) for verdict in found] + [
        f"By {axis} nothing can be said: not all seeds reach {summary.target:.4f} bits per byte."
        for axis in ("tokens", "seconds")
        if axis not in judged
    ]


def sentence(verdict: Verdict, summary: Summary) -> str:
    """A verdict in words: who is best and by how much, or plainly that no difference can be claimed."""
    bits = verdict.measure == "bits_per_byte"
    measure = f"At equal {EQUAL[verdict.axis]}" if bits else MEASURES[verdict.axis]
    best = f"{verdict.label} has the lowest mean, {verdict.value:.4f} bits per byte"
    if not bits:
        amount = _amount(verdict.value, verdict.axis)
        best = f"{verdict.label} reaches {summary.target:.4f} bits per byte first, after {amount}"
    if verdict.second is None:
        others = "has a finished run to compare it with" if bits else "reaches it in every finished run"
        return f"{measure}, {best}; no other cell {others}."
    if verdict.difference is None:
        return f"{measure}, no difference can be claimed: {best}, but shares no seed with {verdict.second}."
    low, mean, high = (
        None if number is None else _signed(number, verdict)
        for number in (verdict.difference.low, verdict.difference.mean, verdict.difference.high)
    )
    gap = f"{mean} against {verdict.second}"
    if low is None:
        return f"{measure}, no difference can be claimed from one seed: {best} ({gap})."
    interval = f"95% interval {low} to {high}, {verdict.difference.n} seeds"
    if not verdict.difference.is_clear:
        return f"{measure}, no difference can be claimed: {best}, but {gap} is uncertain ({interval})."
    return f"{measure}, {best}: {gap} ({interval})."


def headline(request: Record, records: Sequence[Record], summary: Summary) -> list[Tile]:
    """The tiles: what was compared, and the best cell."""
    status = [record["status"] for record in records]
    failed = status.count(FAILED)
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(record["seed"] for record in records))
    means = [
        (cell.figures["bits_per_byte"].mean, cell.label) for cell in summary.cells if "bits_per_byte" in cell.figures
    ]
    lowest, label = min(means, default=(None, "no finished run"))
    budget = request["budget"]
    return [
        Tile("Cells", str(len(summary.cells)), f"compared with {summary.baseline}"),
        Tile("Seeds", str(len(request["seeds"])), f"seed {seeds}"),
        Tile("Budget of a run", budget["text"], f"equal {EQUAL[budget['kind']]}"),
        Tile("Finished runs", f"{status.count(FINISHED)} of {len(status)}", f"{failed} failed" if failed else ""),
        Tile("Lowest bits per byte", "–" if lowest is None else f"{lowest:.4f}", label),
    ]


def reading(request: Record, summary: Summary) -> list[tuple[str, str]]:
    """Notes that apply to the whole page, as (head, text)."""
    totals = [cell.record["parameters"]["total"] for cell in summary.cells]
    seeds = len(request["seeds"])
    spread = (
        "One seed shows no scatter: the order of the cells could be chance, and no interval can be given."
        if seeds == 1
        else f"The interval from {seeds} seeds says how well the mean over seeds is known, for these data and "
        "settings. It assumes differences that scatter like a normal distribution, which few seeds cannot show."
    )
    return [
        ("Lower is better", "Bits per byte are the model's loss on held-out text, independent of the tokenizer."),
        (f"{seeds} seed{'s' if seeds > 1 else ''}", spread),
        (
            "The best of several",
            "The winner is named after looking at all cells, so its lead is flattered by luck. Repeat a close "
            "result with new seeds before building on it.",
        ),
        (
            "One machine",
            f"Seconds and tokens per second belong to {request['machine']}, {request['threads']} threads, and to this "
            "implementation. Elsewhere a router that is slow here may be fast; tokens and FLOPs do not change.",
        ),
        (
            "Equal active FLOPs",
            "Cells are sized so that a token costs nearly the same in all of them. Memory does not cost anything in "
            "this count, so cells with more experts hold more parameters.",
        ),
        (
            "Small models",
            f"Cells have {format_count(min(totals))} to {format_count(max(totals))} parameters and a short training. "
            "What wins here need not win at a thousand times the size.",
        ),
        (
            "One setting for all",
            "Learning rate, batch and schedule were the same for every cell and tuned for none. A cell that wants "
            "another learning rate looks worse than it is.",
        ),
    ]


def facts(request: Record) -> list[tuple[str, str]]:
    """The request in words, for anyone who wants to repeat it."""
    budget = request["budget"]
    return [
        ("Routers", request["routers"]),
        ("Budget", f"{budget['text']} a run, equal {EQUAL[budget['kind']]}"),
        ("Seeds", ", ".join(map(str, request["seeds"]))),
        ("Preset", request["preset"]),
        ("Expansion: experts in total for each active one", str(request["expansion"])),
        ("Machine", request["machine"]),
        ("Threads", f"{request['threads']}, {request['jobs']} run{'s' if request['jobs'] > 1 else ''} at once"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in request["versions"].items())),
        ("Commit", request["commit"] or "not recorded"),
    ]


def _amount(value: float, axis: str) -> str:
    return duration(value) if axis == "seconds" else f"{format_count(value)} {'FLOPs' if axis == 'flops' else 'tokens'}"


def _signed(value: float, verdict: Verdict) -> str:
    """A difference in the unit of its verdict."""
    if verdict.measure == "bits_per_byte":
        return signed(value)
    size = duration(abs(value)) if verdict.axis == "seconds" else format_count(abs(value))
    return ("−" if value < 0 else "+") + size
