"""The tables of a comparison as text: results, balance, sizes and domains of every cell, and the runs that failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moestro.compare.results import FINISHED, CellSummary, Difference, Estimate, Summary
from moestro.report.tiles import UNKNOWN, format_count, format_seconds

LEAST_SHADE = 0.01  # a difference below 1% never gets the full colour

Record = dict[str, Any]


class Entry(NamedTuple):
    """The content of a table cell; `note` is small print below, `strong` marks a difference that can be claimed."""

    text: str
    note: str = ""
    strong: bool = False
    shade: float | None = None  # -1 (much better than the reference) to 1 (much worse)


NOTHING = Entry(UNKNOWN)


def signed(value: float, digits: int = 4) -> str:
    """A difference with a typographic sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(value: float) -> str:
    """Seconds, with a decimal below one minute."""
    return f"{value:.1f} s" if value < 60 else format_seconds(value)


def result_table(summary: Summary) -> Record:
    """For every cell: bits per byte, the difference from the baseline, and what the target level costs."""
    target = "the target" if summary.target is None else f"{summary.target:.4f}"
    heads = ["Bits per byte", "Seeds", f"Difference to {summary.baseline}"]
    heads += [f"Tokens to {target}", f"Time to {target}", "Tokens per second"]
    drafts = any("mtp_agreement" in cell.figures for cell in summary.cells)
    rows = []
    for color, cell in enumerate(summary.cells):
        entries = [_decimal(cell.figures.get("bits_per_byte"), 4), _seeds(cell), _difference(cell, summary.baseline)]
        entries += [_cost(cell, "tokens"), _cost(cell, "seconds")]
        entries.append(_count(cell.figures.get("tokens_per_second")))
        entries += [_percent(cell.figures.get("mtp_agreement"))] if drafts else []
        rows.append(_row(cell, color, entries))
    return {"heads": heads + (["MTP agreement"] if drafts else []), "rows": rows}


def balance_table(summary: Summary) -> Record | None:
    """The balance of every cell with a router and a finished run; None if there is no such cell."""
    columns = [
        ("max_vio_batch", "MaxVio of a batch", 3),
        ("max_vio_global", "MaxVio over all held-out text", 3),
        ("load_cv", "Load sd / mean", 3),
        ("entropy", "Load entropy", 4),
        ("dead_experts", "Dead experts", 1),
    ]
    rows = []
    for color, cell in enumerate(summary.cells):
        if cell.figures.keys() & {"max_vio_batch", "max_vio_global"}:
            entries = [_decimal(cell.figures.get(key), digits) for key, _, digits in columns]
            rows.append(_row(cell, color, [*entries, _percent(cell.figures.get("dropped"))]))
    heads = [*(head for _, head, _ in columns), "Dropped choices"]
    return {"heads": heads, "rows": rows} if rows else None


def size_table(summary: Summary) -> Record:
    """The sizes of every cell, known before anything is trained."""
    first = summary.cells[0].record["flops_per_token"]
    heads = ["Scheme", "Parameters", "Experts", "Expert width", "FLOPs per token", "Cache bytes per token"]
    rows = []
    for color, cell in enumerate(summary.cells):
        record, size = cell.record, cell.record["parameters"]
        entries = [
            Entry(record["scheme"], ", ".join(record["overrides"])),
            Entry(format_count(size["total"]), f"{format_count(size['active'])} active"),
            Entry("dense"),
            Entry(f"{record['dense_dim']:,}", "dense layers"),
            Entry(format_count(record["flops_per_token"]), f"{record['flops_per_token'] / first:.3f} × first"),
            Entry(f"{record['cache_bytes_per_token']:,}"),
        ]
        if record["num_experts"]:
            shared = f", {record['num_shared_experts']} shared" if record["num_shared_experts"] else ""
            entries[2] = Entry(f"{record['num_experts']:,}", f"{record['top_k']} chosen{shared}")
            entries[3] = Entry(f"{record['expert_dim']:,}", f"dense {record['dense_dim']:,}")
        rows.append(_row(cell, color, entries))
    return {"heads": heads, "rows": rows}


def domain_table(summary: Summary) -> Record | None:
    """Bits per byte by domain, and how far above or below the baseline; None if no cell has a domain.

    If the baseline has no finished run, another cell takes its place.
    """
    cells = [(color, cell) for color, cell in enumerate(summary.cells) if cell.domains]
    if not cells:
        return None
    reference = next((cell for _, cell in cells if cell.label == summary.baseline), cells[0][1])
    names = list(dict.fromkeys(name for _, cell in cells for name in cell.domains))
    changes = {
        (cell.label, name): cell.domains[name].mean / reference.domains[name].mean - 1
        for _, cell in cells
        for name in cell.domains.keys() & reference.domains.keys()
        if reference.domains[name].mean > 0
    }
    limit = max([LEAST_SHADE, *map(abs, changes.values())])

    def entry(cell: CellSummary, name: str) -> Entry:
        if name not in cell.domains:
            return NOTHING
        text, change = f"{cell.domains[name].mean:.4f}", changes.get((cell.label, name))
        if cell is reference or change is None:
            return Entry(text, "reference" if cell is reference else "")
        return Entry(text, f"{signed(change * 100, 1)}%", shade=round(change / limit, 3))

    rows = [_row(cell, color, [entry(cell, name) for name in names]) for color, cell in cells]
    return {"heads": names, "reference": reference.label, "limit": f"{limit * 100:.1f}%", "rows": rows}


def unfinished_runs(records: Sequence[Record]) -> list[Record]:
    """The runs that count nowhere, with the last words of their logs."""
    colors = {label: color for color, label in enumerate(dict.fromkeys(record["label"] for record in records))}
    keys = ("label", "seed", "status", "error")
    return [
        {"color": colors[record["label"]], **{key: record[key] for key in keys}}
        for record in records
        if record["status"] != FINISHED
    ]


def _row(cell: CellSummary, color: int, entries: Sequence[Entry]) -> Record:
    return {"label": cell.label, "color": color, "entries": entries}


def _seeds(cell: CellSummary) -> Entry:
    return Entry(str(cell.finished), f"{cell.failed} failed" if cell.failed else "")


def _difference(cell: CellSummary, baseline: str) -> Entry:
    if cell.label == baseline:
        return Entry(UNKNOWN, "baseline")
    return NOTHING if cell.difference is None else difference_entry(cell.difference)


def difference_entry(difference: Difference) -> Entry:
    """A paired difference in bits per byte with its interval, or why it has none."""
    if difference.low is None or difference.high is None:
        return Entry(signed(difference.mean), "one pair, no interval")
    interval = f"{signed(difference.low)} to {signed(difference.high)}"
    return Entry(signed(difference.mean), interval, strong=difference.is_clear)


def _cost(cell: CellSummary, axis: str) -> Entry:
    cost = cell.to_target.get(axis)
    if cost is None:
        return Entry(UNKNOWN, "never" if cell.finished else "")
    text = duration(cost.mean) if axis == "seconds" else format_count(cost.mean)
    if cost.n < cell.finished:
        return Entry(text, f"{cost.n} of {cell.finished} runs reach it")
    if cost.sd is None:
        return Entry(text)
    return Entry(text, f"± {duration(cost.sd) if axis == 'seconds' else format_count(cost.sd)}")


def _decimal(value: Estimate | None, digits: int) -> Entry:
    if value is None:
        return NOTHING
    return Entry(f"{value.mean:.{digits}f}", "" if value.sd is None else f"± {value.sd:.{digits}f}")


def _count(value: Estimate | None) -> Entry:
    if value is None:
        return NOTHING
    return Entry(format_count(value.mean), "" if value.sd is None else f"± {format_count(value.sd)}")


def _percent(value: Estimate | None) -> Entry:
    if value is None:
        return NOTHING
    return Entry(f"{value.mean * 100:.2f}%", "" if value.sd is None else f"± {value.sd * 100:.2f}%")
