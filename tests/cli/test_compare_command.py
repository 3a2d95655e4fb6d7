"""`moestro compare` as a user calls it: real trainings of a few steps, Ctrl-C, and mistakes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from command_line import Call
from rich.console import Console
from rich.table import Table

from moestro.cli.compare import balance_table, difference_text, results_table, spread, target_text
from moestro.compare.results import (
    CellSummary,
    Difference,
    Estimate,
    Summary,
    read_results,
)
from moestro.training.metrics import read_metrics
from moestro.training.ownership import own_directory

SMALL = (
    *("model.vocab_size=300", "model.hidden_dim=32", "model.num_layers=2", "model.dense_dim=64", "train.threads=1"),
    *("train.seq_len=32", "train.batch_size=4", "data.valid_fraction=0.1", "train.warmup_steps=2"),
)


@pytest.fixture
def compare(call: Call) -> Call:
    """`compare("--budget", "1ktok")` -> what `moestro compare` gives."""
    return partial(call, "compare")


@pytest.fixture(scope="module")
def small(text_file: Path) -> list[str]:
    """Flags of a base of two narrow layers on a little text."""
    return ["--data", str(text_file), *(part for pair in SMALL for part in ("--set", pair)), "--seeds", "1"]


@pytest.mark.slow
def test_cells_are_trained_shown_and_not_trained_again(
    call: Call, compare: Call, small: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cells = "dense,v3=deepseek-v3:mtp_depth=1,bad=switch:vocab_size=10"
    arguments = ("--routers", cells, "--budget", "1ktok", "--out", out, *small, "--json")
    code, stdout, stderr = compare(*arguments)
    assert code == 1 and "1 of 3 runs failed" in stderr and "bad, seed 0 failed: the tokenizer has" in stderr
    tree = json.loads(stdout.strip().splitlines()[-1])
    assert (tree["runs"], tree["finished"], tree["failed"], tree["baseline"]) == (3, 2, 1, "dense")
    assert Path(tree["report"]).is_file() and "At equal tokens" in stdout and "(one seed)" in stdout

    dense, v3, bad = read_results(out)
    assert (dense["status"], v3["status"], bad["status"]) == ("finished", "finished", "failed")
    assert dense["steps"] == v3["steps"] == 8 and dense["tokens"] == v3["tokens"] == 1024
    assert v3["curve"]["tokens"] == dense["curve"]["tokens"] == [128 * step for step in range(1, 9)]
    seconds = [1024 / 8 / step["tokens_per_second"] for step in read_metrics(out / v3["run"])]
    assert v3["seconds"] == pytest.approx(sum(seconds)) and v3["curve"]["seconds"][-1] == pytest.approx(sum(seconds))
    assert 0 <= v3["entropy"] <= 1 and v3["max_vio_global"] >= 0 and v3["mtp_agreement"] is not None
    assert dense["entropy"] is None and set(dense["domains"]) == {"words"}
    assert tree["cells"][1]["difference"]["mean"] == pytest.approx(v3["bits_per_byte"] - dense["bits_per_byte"])

    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert call("report", out)[0] == 0 and (out / "report.html").read_bytes() == page

    fewer = ("--routers", "dense,v3=deepseek-v3:mtp_depth=1", "--budget", "1ktok", "--out", out, *small)
    changed = (out / v3["run"] / "run.json").stat().st_mtime_ns
    code, _, stderr = compare(*fewer)
    assert code == 2 and "leaves out" in stderr and (out / v3["run"] / "run.json").stat().st_mtime_ns == changed


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "--routers", "switch,hash", "--budget", "9Mtok", "--out", str(out), *small]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "moestro", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment, text=True, start_new_session=True,
    )  # fmt: skip
    run = out / "cells" / "switch" / "seed-0"
    deadline = time.monotonic() + 300
    while not read_metrics(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does, to the whole group
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "Go on with:\n  moestro compare --routers switch,hash" in stderr
    stopped, waiting = read_results(out)
    assert (stopped["status"], waiting["status"], stopped["error"]) == ("stopped", "waiting", None)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert (checkpoint / "manifest.json").is_file() and stopped["steps"] == int(checkpoint.name.removeprefix("step-"))


def test_a_dry_run_shows_cells_and_writes_nothing(compare: Call, small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--routers", "dense,[b]=switch:expert_dim=4", "--budget", "1ktok", "--out", out, "--dry-run", *small)
    code, stdout, stderr = compare(*arguments, "--json")
    tree = json.loads(stdout.strip().splitlines()[-1])
    assert code == 0 and not out.exists() and "[b]" in stdout
    assert [cell["label"] for cell in tree["cells"]] == ["dense", "[b]"] and tree["cells"][0]["flops_ratio"] == 1.0
    assert tree["cells"][1]["num_experts"] == 8 and tree["cells"][1]["steps"] == 8
    assert "warning" in stderr and "[b]" in stderr and "dense costs" not in stderr
    assert tree["estimated_seconds"] > 0 and "2 runs: about" in stdout and "a measured step of each cell" in stdout


def test_a_dry_run_adds_up_a_budget_of_time(compare: Call, small: list[str], tmp_path: Path) -> None:
    arguments = ("--routers", "dense,switch", "--budget", "10m", "--out", tmp_path / "out", "--dry-run")
    _, stdout, _ = compare(*arguments, *small, "--json")
    assert "2 runs: about 20:00 of training by the budget" in stdout
    assert json.loads(stdout.strip().splitlines()[-1])["estimated_seconds"] == 1200


def test_a_second_comparison_in_one_folder_is_told_of_the_first(
    compare: Call, small: list[str], tmp_path: Path
) -> None:
    with own_directory(tmp_path / "out", lambda directory: True):
        code, _, stderr = compare("--routers", "dense", "--budget", "1ktok", "--out", tmp_path / "out", *small)
    assert code == 2 and f"is being written by process {os.getpid()} since" in stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"writer.lock"}


def test_tables_fit_eighty_columns() -> None:
    one = Estimate(2.06412, 0.0123, 3)
    figures = {
        "bits_per_byte": one, "max_vio_batch": one, "max_vio_global": one, "entropy": one, "dead_experts": one,
        "dropped": one, "tokens_per_second": Estimate(14_500.0, 300.0, 3),
    }  # fmt: skip
    cells = tuple(
        CellSummary(label, {}, 3, 0, figures, {}, Difference(-0.1, -0.15, -0.05, 3), {"seconds": Estimate(7e3, 5.0, 2)})
        for label in ("deepseek-moe", "no-shared-v3")
    )
    summary = Summary("deepseek-moe", 2.064, cells)
    for table in (results_table(summary), balance_table(summary)):
        lines = draw(table)
        assert max(map(len, lines)) <= 80 and any("no-shared-v3" in line for line in lines)


def draw(table: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "soon"), "none of 10m"),
        (("--budget", "10m", "--equal", "flops"), "budget in tokens"),
        (("--routers", "dense,nothing"), "no preset 'nothing'"),
        (("--set", "model.top_k=2"), "belongs to a cell"),
        (("--set", "train.steps=3"), "--budget"),
        (("--preset", "nothing"), "nothing"),
        (("--jobs", "0"), "jobs must be"),
    ],
)
def test_mistakes_are_one_line(compare: Call, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, _, stderr = compare(*arguments, "--out", tmp_path / "out")
    assert code == 2 and message in stderr and len(stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_texts_of_the_table() -> None:
    assert spread(Estimate(1.23456, 0.01, 3)) == "1.2346 ± 0.0100" and spread(Estimate(1.0, None, 1)) == "1.0000"
    targets = {"seconds": Estimate(1234.5, None, 1)}
    cell = CellSummary("a", {}, 3, 0, {}, {}, Difference(-0.1, -0.15, -0.05, 3), targets)
    assert difference_text(cell) == "-0.1000 ± 0.0500" and target_text(cell) == "1,234 (1 of 3)"
