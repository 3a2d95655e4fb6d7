"""The runs behind docs/evidence.md: every cell trained by one `moestro compare`, a table and a figure a claim.

    python bench/evidence.py run  [--out runs/evidence] [--seeds 3] [--budget 500ktok] [--jobs 2]     an hour or two
    python bench/evidence.py show [--out runs/evidence] [--figures docs/figures]                     tables, figures
    python bench/evidence.py map  [--out runs/evidence]           do the maps of two seeds show the same structure?

`run` goes on where it was stopped. Cells occur in several claims and are trained once. `show` works at any time on what
has finished. The built-in corpus, a tokenizer of 2048, a model of 128 × 4 layers whose FFN costs a token what a dense
one of 256 would; everything else is in the cells.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moestro.compare.results import FINISHED, CellSummary, read_results, summarise
from moestro.training.metrics import read_domain_loads

FREE = "loss-free:router.bias_speed=0.01"
AUX = "loss-free:router.bias=none:router.balance="
V3 = "deepseek-v3:router.bias_speed=0.01"
CELLS = {
    "dense": "dense",
    "hash": "hash",
    "switch": "switch",
    "gshard": "gshard:moe_every=1",
    "deepseek-moe": "deepseek-moe",
    "no-shared": "deepseek-moe:num_shared_experts=0:top_k=8",
    "loss-free": FREE,
    "unbalanced": f"{AUX}[]",
    "aux-sequence": f'{AUX}[{{kind="sequence",weight=0.001}}]',
    "aux-batch": f'{AUX}[{{kind="expert",weight=0.001}}]',
    "aux-batch-10": f'{AUX}[{{kind="expert",weight=0.01}}]',
    "shazeer-0-0": "shazeer:router.balance=[]",
    "shazeer-0.2-0": 'shazeer:router.balance=[{kind="importance",weight=0.2}]',
    "shazeer-0-0.2": 'shazeer:router.balance=[{kind="load",weight=0.2}]',
    "shazeer-0.1-0.1": "shazeer",
    "switch-1.0": "switch:router.capacity.factor=1.0",
    "switch-2.0": "switch:router.capacity.factor=2.0",
    "gshard-1.25": "gshard:moe_every=1:router.capacity.factor=1.25",
    "gshard-2.0": "gshard:moe_every=1:router.capacity.factor=2.0",
    "mla": V3,
    "mha": f"{V3}:attention=mha",
    "gqa": f"{V3}:attention=gqa:num_kv_heads=2",
    "mqa": f"{V3}:attention=mqa",
    "mtp-1": f"{V3}:mtp_depth=1",
    "mtp-2": f"{V3}:mtp_depth=2",
}
SETTINGS = (
    *("model.dense_dim=256", "train.seq_len=128", "train.batch_size=8", "train.lr=4e-3", "train.eval_tokens=4096"),
    "data.valid_fraction=0.01",
)


@dataclass(frozen=True)
class Claim:
    """One item of the evidence: the cells it compares, the first being what the others are held against."""

    title: str
    cells: tuple[str, ...]
    columns: tuple[str, ...] = ("max_vio_batch", "max_vio_global", "dropped")


CLAIMS = {
    "order": Claim(
        "Loss at equal active compute, and the shared expert",
        ("dense", "hash", "switch", "gshard", "deepseek-moe", "no-shared"),
        ("tokens_per_second", "max_vio_global", "dropped"),
    ),
    "balance": Claim(
        "Loss-free balancing against auxiliary losses",
        ("loss-free", "unbalanced", "aux-sequence", "aux-batch", "aux-batch-10"),
        ("max_vio_batch", "max_vio_global", "entropy"),
    ),
    "shazeer": Claim(
        "Importance and load losses",
        ("shazeer-0-0", "shazeer-0.2-0", "shazeer-0-0.2", "shazeer-0.1-0.1"),
        ("load_cv", "max_over_mean", "dead_experts"),
    ),
    "capacity": Claim(
        "Capacity factors",
        ("switch-1.0", "switch", "switch-2.0", "gshard", "gshard-1.25", "gshard-2.0"),
        ("dropped", "max_vio_batch", "tokens_per_second"),
    ),
    "attention": Claim(
        "MLA against MHA, GQA, MQA", ("mla", "mha", "gqa", "mqa"), ("cache_bytes_per_token", "tokens_per_second")
    ),
    "mtp": Claim("Multi-token prediction", ("mla", "mtp-1", "mtp-2"), ("mtp_agreement", "tokens_per_second")),
}


def command(out: Path, seeds: int, budget: str, jobs: int) -> list[str]:
    """The one `moestro compare` that trains everything."""
    cells = ",".join(f"{label}={spec}" if label != spec else label for label, spec in CELLS.items())
    settings = [part for pair in SETTINGS for part in ("--set", pair)]
    sizes = ["--seeds", str(seeds), "--budget", budget, "--jobs", str(jobs)]
    return [sys.executable, "-m", "moestro", "compare", "--routers", cells, *sizes, *settings, "--out", str(out)]


COLUMNS = {
    "max_vio_batch": ("MaxVio, batch", "{:.2f}"),
    "max_vio_global": ("MaxVio, global", "{:.2f}"),
    "entropy": ("entropy", "{:.3f}"),
    "load_cv": ("CV of loads", "{:.2f}"),
    "max_over_mean": ("max/mean", "{:.2f}"),
    "dead_experts": ("dead", "{:.1f}"),
    "dropped": ("dropped", "{:.1%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "cache_bytes_per_token": ("cache B/token", "{:,.0f}"),
    "mtp_agreement": ("draft accepted", "{:.1%}"),
}


def select(records: Sequence[dict[str, Any]], claim: Claim) -> list[dict[str, Any]]:
    """The claim's records, in its order."""
    return [record for label in claim.cells for record in records if record["label"] == label]


def table(claim: Claim, records: Sequence[dict[str, Any]]) -> str:
    """The claim as a Markdown table: means ± sd over seeds, differences to the first cell with their 95% interval."""
    summary = summarise(records)
    names = ["cell", "parameters", "bits per byte", f"to {summary.baseline} (95%)", "n"]
    lines = [names + [COLUMNS[column][0] for column in claim.columns]]
    lines.append(["---"] * len(lines[0]))
    for cell in summary.cells:
        bits, gap = cell.figures["bits_per_byte"], cell.difference
        spread = f" ± {bits.sd:.4f}" if bits.sd is not None else ""
        total, active = (cell.record["parameters"][key] / 1e6 for key in ("total", "active"))
        row = [cell.label, f"{total:.2f}M / {active:.2f}M", f"{bits.mean:.4f}{spread}"]
        row.append("" if gap is None else f"{gap.mean:+.4f}" + interval(gap.low, gap.high))
        lines.append([*row, str(bits.n), *(figure(cell, column) for column in claim.columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(low: float | None, high: float | None) -> str:
    """An interval in brackets, in bold where it leaves out zero."""
    if low is None or high is None:
        return ""
    text = f"({low:+.4f} … {high:+.4f})"
    return f" **{text}**" if low > 0 or high < 0 else f" {text}"


def figure(cell: CellSummary, column: str) -> str:
    """One figure of a cell; a dash where it has none."""
    if column in cell.figures:
        return COLUMNS[column][1].format(cell.figures[column].mean)
    value = cell.record.get(column)
    return "–" if value is None else COLUMNS[column][1].format(value)


def draw(claim: Claim, records: Sequence[dict[str, Any]]) -> str:
    """Final bits per byte as an SVG: a dot for every seed, a line at the mean; lower is to the left."""
    rows = {
        label: [r["bits_per_byte"] for r in records if r["label"] == label and r["status"] == FINISHED]
        for label in claim.cells
    }
    values = [value for row in rows.values() for value in row]
    low, high = min(values), max(values)
    low, high = low - 0.06 * (high - low + 0.01), high + 0.06 * (high - low + 0.01)

    def x(value: float) -> float:
        return 150 + 470 * (value - low) / (high - low)

    height = 34 * len(rows) + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-family="system-ui, sans-serif">',
        f'<rect width="720" height="{height}" fill="#ffffff"/>',
        f'<text x="14" y="24" font-size="14" font-weight="600" fill="#1d2330">{claim.title}</text>',
    ]
    for index, (label, row) in enumerate(rows.items()):
        y = 34 * index + 56
        parts.append(f'<line x1="150" x2="620" y1="{y}" y2="{y}" stroke="#dfe3ea"/>')
        parts.append(f'<text x="138" y="{y + 4}" font-size="12" text-anchor="end" fill="#1d2330">{label}</text>')
        parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="4.5" fill="#3563c9" fill-opacity="0.55"/>' for v in row]
        if row:
            at = x(fmean(row))
            ends = f'x1="{at:.1f}" x2="{at:.1f}" y1="{y - 11}" y2="{y + 11}"'
            parts.append(f'<line {ends} stroke="#b3391f" stroke-width="2"/>')
            parts.append(f'<text x="632" y="{y + 4}" font-size="12" fill="#1d2330">{fmean(row):.4f}</text>')
    note = "bits per byte of held-out text; a dot is a seed, the line their mean; lower is better"
    parts.append(f'<text x="150" y="{height - 12}" font-size="11" fill="#5b6475">{note}</text></svg>')
    return "\n".join(parts) + "\n"


def show(out: Path, figures: Path | None) -> None:
    """Print every claim's table; write its figure."""
    records = [record for record in read_results(out) if record["status"] == FINISHED]
    for name, claim in CLAIMS.items():
        chosen = select(records, claim)
        if not chosen:
            continue
        print(f"### {claim.title}\n\n{table(claim, chosen)}\n")
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
            (figures / f"{name}.svg").write_text(draw(claim, chosen), "utf-8")


def domain_likeness(loads: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """loads [D, L, E] -> [L, pairs of domains]: how much of their choices two domains share, Σ_e min(p_e, q_e)."""
    share = loads / loads.sum(axis=-1, keepdims=True)
    pairs = itertools.combinations(range(len(loads)), 2)
    return np.stack([np.minimum(share[a], share[b]).sum(axis=-1) for a, b in pairs], axis=1)


def compare_maps(out: Path, cell: str = "mla") -> None:
    """Experts have no identity across seeds, but domains do: is who shares experts with whom the same?

    Correlation, over pairs of domains, of the likeness in one seed with that in another, layer by layer.
    """
    records = [r for r in read_results(out) if r["label"] == cell and r["status"] == FINISHED]
    runs = [out / record["run"] for record in records]
    maps, names = [], []
    for run in runs:
        names, by_step = read_domain_loads(run)
        maps.append(domain_likeness(by_step[max(by_step)].astype(np.float64)))
    for a, b in itertools.combinations(range(len(runs)), 2):
        rows = zip(maps[a], maps[b], strict=True)
        print(runs[a].name, runs[b].name, " ".join(f"{np.corrcoef(x, y)[0, 1]:+.2f}" for x, y in rows))
    mean = np.mean(maps, axis=(0, 1))
    for (a, b), value in zip(itertools.combinations(names, 2), mean, strict=True):
        print(f"{a:<10} {b:<10} share {value:.0%} of their choices")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "show", "map"))
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="500ktok")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    if options.action == "run":
        sys.exit(subprocess.run(command(options.out, options.seeds, options.budget, options.jobs)).returncode)
    if options.action == "show":
        show(options.out, options.figures)
    else:
        compare_maps(options.out)


if __name__ == "__main__":
    main()
