"""docs/runs.md names every field that a run and a comparison write, and no other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from moestro.compare.cells import parse_cells
from moestro.compare.results import collect_run, run_path
from moestro.training.metrics import read_evals, read_metrics

TEXT = (Path(__file__).parent.parent / "docs" / "runs.md").read_text("utf-8")


def documented(heading: str, table: int = 0) -> set[str]:
    """The names in the first column of a table below a heading."""
    section = re.split(r"^## ", TEXT.split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.split(r"^\|---.*$", section, flags=re.MULTILINE)[table + 1]
    lines = [line for line in rows.strip().splitlines() if line.startswith("| `")]
    return {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def test_fields_of_a_run(tiny_run: Path) -> None:
    told = json.loads((tiny_run / "run.json").read_text())
    assert documented("metrics.jsonl") == read_metrics(tiny_run)[-1].keys()
    assert documented("evals.jsonl") == read_evals(tiny_run)[-1].keys()
    assert documented("run.json") == told.keys()
    assert documented("run.json", 1) == told["starts"][-1].keys()


def test_fields_of_a_comparison(tiny_run: Path, tmp_path: Path) -> None:
    (cell,) = parse_cells("deepseek-v3")
    run = run_path(tmp_path, cell, 0)
    shutil.copytree(tiny_run, run)
    shutil.copy(tiny_run / "settings.json", run.with_suffix(".json"))
    record = collect_run(tmp_path, cell, 0)
    assert record["status"] == "finished" and record["max_vio_global"] is not None
    assert documented("results.jsonl") == record.keys()


def test_files_of_a_run(tiny_run: Path) -> None:
    section = TEXT.split("\n## A run directory\n")[1].split("\n## ")[0]
    named = {
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([\w.]+)", line.split("|")[1])
    }
    assert {path.name for path in tiny_run.iterdir()} - {"report.html"} <= named
