"""Plans and processes: what is skipped, resumed, refused and survived. The processes are stand-ins that write a log."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moestro.compare.plan import Plan, describe_commit, make_plan, prepare_directory
from moestro.compare.results import Record, collect, read_results
from moestro.compare.runner import Runner, core_group, last_line, pinned
from moestro.config import Config, load_file
from moestro.errors import ConfigError

# notes its start, then does what a training would leave behind, or fails with a line for the label that should
WORKER = """
import json, os, sys
from pathlib import Path
config, run = map(Path, sys.argv[1:])
started = Path(os.environ["STARTED"])
with started.open("a") as file:
    file.write(f"{run.parent.name}/{run.name} {len(os.sched_getaffinity(0))}\\n")
if run.parent.name == os.environ.get("BROKEN"):
    print("Traceback (most recent call last):\\nMemoryError: no room\\n", file=sys.stderr)
    sys.exit(3)
settings = json.loads(config.read_text())
(run / "settings.json").write_text(json.dumps(settings))
step = {"step": 1, "tokens": 8, "tokens_per_second": 4.0, "max_vio": 0.5, "dropped": 0.0, "mtp_agreement": None}
(run / "metrics.jsonl").write_text(json.dumps(step) + "\\n")
bits = 2.0 + settings["train"]["seed"]
evaluation = {"step": 1, "tokens": 777, "seconds": 9.0, "loss": 1.0, "bits_per_byte": bits, "domains": {}}
(run / "evals.jsonl").write_text(json.dumps(evaluation) + "\\n")
(run / "run.json").write_text(json.dumps({"finished": True}))
"""

MakePlan = Callable[..., Plan]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The runs that stand-ins were started for, since the last call."""
    path = tmp_path / "started"
    monkeypatch.setenv("STARTED", str(path))

    def lines() -> list[str]:
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return [line.split()[0] for line in text.splitlines()]

    return lines


@pytest.fixture
def plan_of(tmp_path: Path, make_config: Callable[..., Config]) -> MakePlan:
    """`plan_of(routers, seeds=2, …)`: a plan of the tiny configuration in the same directory every time."""

    def make(routers: str = "dense,switch", *overrides: str, **changes: Any) -> Plan:
        options: dict[str, Any] = {"preset": "tiny", "seeds": 2, "budget": "1ktok", "equal": None, "expansion": 4}
        tree = make_config().model_dump(mode="json")
        return make_plan(tmp_path / "out", routers, tree, overrides, **(options | {"jobs": 1} | changes))

    return make


def run_plan(plan: Plan) -> list[Record]:
    """Prepare and run with stand-ins; the records that were reported."""
    reported: list[Record] = []
    prepare_directory(plan, "moestro compare", lambda text: None)
    runner = Runner(plan, reported.append, lambda config, run: [sys.executable, "-c", WORKER, str(config), str(run)])
    assert runner.run() is None
    assert list(runner.records.values()) == read_results(plan.directory)
    return reported


def test_the_time_left_follows_from_runs_that_finished(plan_of: MakePlan, started: Callable[[], list[str]]) -> None:
    runner = Runner(plan_of("dense,switch,glam", seeds=3, jobs=1), lambda record: None)
    assert runner.seconds_left() is None
    runner.queue.extend((cell, seed) for cell in runner.plan.cells for seed in (1, 2))
    runner.wall = {"dense": [10.0, 14.0], "switch": [20.0]}
    assert runner.seconds_left() == pytest.approx(2 * 12 + 2 * 20 + 2 * 16)  # glam: the mean of the others
    runner.plan = replace(runner.plan, jobs=2)
    assert runner.seconds_left() == pytest.approx((2 * 12 + 2 * 20 + 2 * 16) / 2)


def test_configurations_follow_from_the_plan(plan_of: MakePlan) -> None:
    plan = plan_of("switch,deepseek-v3:mtp_depth=1", "train.eval_every=3", "train.lr=0.5")
    configs = [plan.config(cell, seed) for cell, seed in plan.runs()]
    assert [config.train.seed for config in configs] == [0, 0, 1, 1]
    assert {config.train.steps for config in configs} == {round(1000 / (4 * 32))} == {8}
    assert {(c.train.eval_every, c.train.lr, c.train.keep_checkpoints) for c in configs} == {(3, 0.5, 1)}
    assert [config.model.mtp_depth for config in configs] == [1, 1, 1, 1]  # the tiny base has one, too
    assert configs[0].data == configs[1].data and configs[0].model.vocab_size == 300


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"jobs": 0}, {"expansion": 0}, {"jobs": 10_000}])
def test_numbers_that_cannot_be_are_named(plan_of: MakePlan, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        plan_of(**changes)


def test_a_comparison_is_written_skipped_and_extended(plan_of: MakePlan, started: Callable[[], list[str]]) -> None:
    plan = plan_of()
    reported = run_plan(plan)
    order = ["dense/seed-0", "switch/seed-0", "dense/seed-1", "switch/seed-1"]  # a whole table after the first seed
    assert started() == order and [record["status"] for record in reported] == ["finished"] * 4
    records = read_results(plan.directory)
    assert [(r["label"], r["seed"]) for r in records] == [("dense", 0), ("dense", 1), ("switch", 0), ("switch", 1)]
    assert collect(plan.directory) == records
    assert records[0]["max_vio_batch"] is None and records[2]["max_vio_batch"] == 0.5
    run = plan.directory / records[0]["run"]
    assert (run / "data").is_symlink() and (run / "data" / "shards" / "index.json").is_file()

    assert run_plan(plan) == [] and started() == []
    run_plan(plan_of("glam,switch,dense", seeds=3))
    assert started() == ["glam/seed-0", "glam/seed-1", "glam/seed-2", "switch/seed-2", "dense/seed-2"]
    request = load_file(plan.directory / "compare.json")
    assert request["cells"] == ["glam", "switch", "dense"] and request["seeds"] == [0, 1, 2]
    assert request["budget"] == {"kind": "tokens", "value": 1000.0, "text": "1ktok"} and request["version"] == 1
    assert request["settings"]["model"]["num_experts"] == 0 and request["expansion"] == 4


def test_another_request_is_refused(plan_of: MakePlan, started: Callable[[], list[str]]) -> None:
    run_plan(plan_of("dense,a=switch"))
    others = {
        "budget": plan_of("dense,a=switch", budget="2ktok"),
        "settings": plan_of("dense,a=switch", "model.hidden_dim=64"),
        "expansion": plan_of("dense,a=switch", expansion=8),
        "holds a, which": plan_of("dense"),
        "holds dense, seed 1, which": plan_of("a=switch", seeds=1),
        "holds a,": plan_of("dense,a=switch:top_k=2"),
    }
    started()
    for message, plan in others.items():
        with pytest.raises(ConfigError, match=message):
            run_plan(plan)
    assert started() == []


def test_foreign_directories_and_edited_schemes_are_refused(
    plan_of: MakePlan, tmp_path: Path, started: Callable[[], list[str]]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a comparison"):
        run_plan(plan_of())
    (tmp_path / "out" / "letter.txt").unlink()
    scheme = tmp_path / "mine.toml"
    scheme.write_text("[model]\ntop_k = 1\nnum_shared_experts = 0\n")
    run_plan(plan_of(f"x={scheme}"))
    scheme.write_text("[model]\ntop_k = 2\nnum_shared_experts = 0\n")
    with pytest.raises(ConfigError, match="other settings"):
        run_plan(plan_of(f"x={scheme}"))


def test_one_failing_cell_does_not_lose_the_others(
    plan_of: MakePlan, started: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN", "switch")
    run_plan(plan_of("dense,switch,hash"))
    assert len(started()) == 6
    records = read_results(plan_of().directory)
    assert [record["status"] for record in records] == ["finished"] * 2 + ["failed"] * 2 + ["finished"] * 2
    assert records[2]["error"] == "MemoryError: no room" and records[2]["bits_per_byte"] is None
    monkeypatch.delenv("BROKEN")
    run_plan(plan_of("dense,switch,hash"))
    assert started() == ["switch/seed-0", "switch/seed-1"]
    assert {record["status"] for record in read_results(plan_of().directory)} == {"finished"}


def test_an_unfinished_run_is_started_again(plan_of: MakePlan, started: Callable[[], list[str]]) -> None:
    plan = plan_of(seeds=1)
    run_plan(plan)
    (plan.directory / "cells" / "switch" / "seed-0" / "run.json").write_text(json.dumps({"finished": False}))
    assert [record["status"] for record in collect(plan.directory)] == ["finished", "stopped"]
    started()
    run_plan(plan)
    assert started() == ["switch/seed-0"]


def test_a_process_that_says_nothing_still_has_an_error(plan_of: MakePlan) -> None:
    plan = plan_of("dense", seeds=1)
    prepare_directory(plan, "moestro compare", lambda text: None)
    for code, command in ((7, "import sys; sys.exit(7)"), (0, "")):
        Runner(plan, lambda record: None, lambda config, run, c=command: [sys.executable, "-c", c]).run()  # type: ignore[misc]
        (record,) = read_results(plan.directory)
        assert (record["status"], record["error"]) == ("failed", f"ended with exit code {code}")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot bind processes to cores")
def test_runs_at_a_time_share_the_cores(plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with pinned(cores[:1]):
        assert os.sched_getaffinity(0) == set(cores[:1])
    assert os.sched_getaffinity(0) == set(cores)
    assert core_group(0, 1) == cores[:1] and core_group(1, 1) == cores[1:2]
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    run_plan(replace(plan_of(), jobs=2, threads=1))
    lines = (tmp_path / "started").read_text().splitlines()
    assert len(lines) == 4 and (len(cores) < 2 or {line.split()[1] for line in lines} == {"1"})


def test_the_last_line_of_a_log_is_the_last_that_says_something(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"first\n\xff second \n\n  \n")
    assert last_line(log) == "\ufffd second"
    log.write_bytes(b"")
    assert last_line(log) == ""


def test_the_commit_is_that_of_the_code() -> None:
    commit = describe_commit()
    assert commit is None or set(commit.removesuffix("-dirty")) <= set("0123456789abcdef")
