"""The report of a run. Line charts are drawn by uPlot (MIT, in `assets/`), everything else by the page's script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moestro.errors import MoestroError
from moestro.report import lines, maps, quantisation
from moestro.report.export import export_run, for_page, write_figures
from moestro.report.page import render_page, write_page
from moestro.report.tiles import headline
from moestro.training import metrics as log
from moestro.training.run_info import read_run_info

STYLES = ("uPlot.min.css", "report.css")
SCRIPTS = ("uPlot.iife.min.js", "charts.js", "maps.js", "download.js", "page.js")
ABOUT = ("preset", "parameters", "started", "machine", "versions", "command", "finished", "starts")
MAX_TEXT = 2000  # characters of a sample
EARLIER_SAMPLES = 4

Record = dict[str, Any]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of `run` to `out` (default: report.html in the run; a folder: report.html there).

    Works while the run goes on. Raises `MoestroError` if the path is not a run, if logs are damaged, and if `out`
    cannot be written.
    """
    _check_run(run)
    return write_page(render(run), run / "report.html", out)


def _check_run(run: Path) -> None:
    if not (run / "metrics.jsonl").is_file():
        raise MoestroError(f"{run} is not a run: it has no metrics.jsonl", hint="give the folder of train --out")


def render(run: Path) -> str:
    """The page as text."""
    steps, evals, fp8 = log.read_metrics(run), read_all_evals(run), log.read_fp8(run)
    about = _read_about(run)
    figures, missing, table = collect_figures(run, steps, evals)
    figures["charts"] |= quantisation.fp8_charts(fp8) if fp8 else {}
    figures["files"] = for_page(export_run(figures))
    context = {
        "name": run.resolve().name,
        "about": about,
        "versions": about["versions"],
        "tiles": headline(about, steps, evals),
        "figures": figures,
        "missing": missing,
        "table": table,
        "fp8": {"step": fp8[-1]["step"], "layers": quantisation.fp8_table(fp8[-1])} if fp8 else None,
        "samples": group_samples(log.read_samples(run)),
    }
    return render_page("report.html.j2", STYLES, SCRIPTS, figures, context)


def write_run_figures(run: Path, folder: Path) -> list[Path]:
    """Write every figure of a run to `folder`, as SVG and CSV; returns the paths."""
    _check_run(run)
    figures, _, _ = collect_figures(run, log.read_metrics(run), read_all_evals(run))
    fp8 = log.read_fp8(run)
    figures["charts"] |= quantisation.fp8_charts(fp8) if fp8 else {}
    return write_figures(export_run(figures), folder)


def read_all_evals(run: Path) -> list[Record]:
    """The points of the curve, then the final evaluations."""
    return [*log.read_evals(run), *log.read_final_evals(run)]


def collect_figures(
    run: Path, steps: Sequence[Record], evals: Sequence[Record]
) -> tuple[dict[str, Any], dict[str, str], list[Record]]:
    """(data of the figures by name, a sentence for every figure that cannot be drawn, table of top experts)."""
    layers, routing = log.read_routing_layers(run), log.read_routing(run)
    tokens = _tokens_at(routing["step"], steps)
    charts = lines.quality_charts(steps, evals) | lines.optimisation_charts(steps)
    charts |= lines.balance_charts(steps, routing, tokens)
    charts = {name: chart for name, chart in charts.items() if chart["lines"]}
    figures: dict[str, Any] = {"charts": charts}
    table: list[Record] = []
    if len(routing):
        figures["loads"] = maps.load_frames(routing, layers, tokens)
        if biases := maps.bias_lines(routing, layers, tokens):
            figures["biases"] = biases
    names, domain_loads = log.read_domain_loads(run)
    if domain_loads and layers:
        step, loads = list(domain_loads.items())[-1]
        figures["domains"] = maps.domain_figure(names, layers, step, loads)
        table = maps.top_experts(names, layers, loads)
    return figures, explain_missing(figures, bool(steps), bool(layers)), table


def explain_missing(figures: dict[str, Any], started: bool, routed: bool) -> dict[str, str]:
    """One sentence for every section whose figure has no data."""
    no_step = "No training step has been logged yet. Write the report again when the run is under way."
    no_router = "This model is dense: it has no router, so there are no loads to draw."
    drawn = figures["charts"].keys() | figures.keys()
    sentences = {
        "quality": ({"bits", "loss"}, no_step),
        "speed": ({"tokens_per_second", "lr", "grad_norm"}, no_step),
        "mtp": ({"loss_mtp"}, "No multi-token prediction was trained in this run." if started else no_step),
        "balance": ({"max_vio"}, no_step if routed else no_router),
        "loads": ({"loads"}, no_step if routed else no_router),
        "domains": ({"domains"}, "No evaluation has recorded loads by domain yet." if routed else no_router),
        "biases": ({"biases"}, "No router bias has moved in this run." if routed else no_router),
    }
    return {name: sentence for name, (needed, sentence) in sentences.items() if not drawn & needed}


def group_samples(samples: Sequence[Record]) -> list[Record]:
    """For each domain, the latest sample and a few earlier ones spread evenly over the run."""
    groups: dict[str, list[Record]] = {}
    for sample in samples:
        text = {key: _shorten(str(sample.get(key) or "")) for key in ("prompt", "text")}
        groups.setdefault(str(sample.get("domain")), []).append({"step": sample["step"], **text})
    result = []
    for domain, found in groups.items():
        count = min(len(found) - 1, EARLIER_SAMPLES)
        earlier = [found[int(index)] for index in np.linspace(0, len(found) - 2, count)]
        result.append({"domain": domain, "latest": found[-1], "earlier": earlier})
    return result


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"


def _tokens_at(steps: Any, records: Sequence[Record]) -> lines.Floats:
    """Tokens seen at routing steps; the steps themselves while there are no metrics."""
    if not records:
        return np.asarray(steps, np.float64)
    return np.asarray(np.interp(steps, lines.column(records, "step"), lines.column(records, "tokens")))


def _read_about(run: Path) -> Record:
    """The values in run.json for the keys of `ABOUT`; None for missing ones."""
    known = read_run_info(run)
    return {key: known.get(key) for key in ABOUT}
