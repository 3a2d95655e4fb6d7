"""The report as a file: what it holds, what it refuses, and that hostile text stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import CHROMIUM, HOSTILE, Page, check_needs_no_network, draw, own_scripts

from moestro.errors import MoestroError
from moestro.report import write_report
from moestro.training.metrics import STEP_KEYS, RunLog


def record(step: int, **more: Any) -> dict[str, Any]:
    return dict.fromkeys(STEP_KEYS, 1.5) | {"step": step, "tokens": step * 10} | more


def test_every_section_is_drawn_and_explained(demo_run: Path, tmp_path: Path) -> None:
    page = Page(write_report(demo_run, tmp_path / "sub/report.html"))
    ids = [attrs.get("id") for tag, attrs in page.elements if tag == "section"]
    assert ids == ["quality", "speed", "mtp", "balance", "loads", "domains", "biases", "samples"]
    drawn = {attrs["data-chart"] for tag, attrs in page.elements if "data-chart" in attrs}
    assert drawn == set(page.data["charts"]) and len(drawn) == 11
    assert page.text.count("Does not show") == page.text.count("Shows") == 8
    assert "missing" not in [attrs.get("class") for tag, attrs in page.elements if tag == "section"]
    for expected in (
        "18.4M",
        "7.25M active",
        "983K",
        "120 steps",
        "preset demo",
        "finished",
        "옛날 어느 마을에",
    ):
        assert expected in page.text


def test_default_place_and_folder_as_target(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(steps=4, eval_every=2)
    assert write_report(run) == run / "report.html"
    (tmp_path / "out").mkdir()
    assert write_report(run, tmp_path / "out").read_bytes() == (run / "report.html").read_bytes()


def test_the_file_needs_no_network_and_its_policy_matches(demo_run: Path, tmp_path: Path) -> None:
    check_needs_no_network(Page(write_report(demo_run, tmp_path / "r.html")))


def test_own_scripts_never_build_markup_from_text() -> None:
    scripts = own_scripts()
    assert len(scripts) == 5
    for script in scripts.values():
        script = script.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing is fetched from
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|http", script)


def write_hostile(run: Path) -> Path:
    log = RunLog.open(run, [HOSTILE], 2)
    log.step(record(1), np.array([[1, 3]]), np.array([[0.1, -0.1]]))
    domains = {HOSTILE: {"bits_per_byte": 1.0, "loss": 1.0, "tokens": 1, "bytes": 1}, "\ud800": {}}
    evaluation = {
        "step": 1,
        "tokens": 10,
        "seconds": 1,
        "loss": 1.0,
        "bits_per_byte": 1.0,
        "domains": domains,
    }
    log.evaluation(evaluation, np.array([[[1, 3]], [[2, 2]]]))
    log.sample(1, HOSTILE, HOSTILE, HOSTILE + "\ud800\u202e")
    log.close()
    about = {"preset": HOSTILE, "machine": HOSTILE, "command": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    (run / "run.json").write_text(json.dumps(about))
    return run


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = Page(write_report(write_hostile(tmp_path / "run")))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert page.text.count(HOSTILE) >= 6
    assert page.data["domains"]["names"][0] == HOSTILE


def test_a_run_just_started_says_so(tmp_path: Path) -> None:
    RunLog.open(tmp_path / "run", ["1"], 4).close()
    page = Page(write_report(tmp_path / "run"))
    assert page.text.count("No training step has been logged yet") == 5
    assert "No evaluation has recorded loads by domain yet" in page.text
    assert "No sample has been generated yet" in page.text
    assert page.data == {"charts": {}, "files": {}}


def test_a_dense_run_without_evaluation_says_so(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path / "run", [], 0)
    for step in (1, 2):
        log.step(record(step, loss_mtp=None, loss_balance=0, max_vio=None, dead_experts=None), None, None)
    log.close()
    page = Page(write_report(tmp_path / "run"))
    assert page.text.count("This model is dense") == 4
    assert "No multi-token prediction" in page.text
    assert set(page.data["charts"]) == {"loss", "tokens_per_second", "lr", "grad_norm"}


def test_biases_that_never_moved_say_so(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path / "run", ["1"], 4)
    log.step(record(1), np.zeros((1, 4)), np.zeros((1, 4)))
    log.close()
    page = Page(write_report(tmp_path / "run"))
    assert "No router bias has moved" in page.text
    assert "max_vio" not in page.data["charts"]


def test_what_is_no_run_or_no_place_is_refused(demo_run: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MoestroError, match="is not a run"):
            write_report(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MoestroError, match="cannot write the report"):
        write_report(demo_run, tmp_path / "file" / "report.html")


def test_damaged_run_json_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=2)
    (run / "run.json").write_text("{")
    with pytest.raises(MoestroError, match=r"run\.json is damaged"):
        write_report(run)


def test_a_run_of_deepseek_v3_size_stays_small(tmp_path: Path) -> None:
    layers, num_experts = [str(layer) for layer in range(61)], 256
    rng = np.random.default_rng(0)
    log = RunLog.open(tmp_path / "run", layers, num_experts)
    shape = (len(layers), num_experts)
    for step in range(1, 421):
        log.step(record(step), rng.integers(0, 60, shape), rng.normal(0, 0.1, shape))
    names = [f"domain {index}" for index in range(20)]
    domains = {name: {"bits_per_byte": 1.0, "loss": 1.0, "tokens": 1, "bytes": 1} for name in names}
    evaluation = {"step": 420, "tokens": 4200, "seconds": 1, "loss": 1.0, "bits_per_byte": 1.0}
    log.evaluation(evaluation | {"domains": domains}, rng.integers(0, 99, (20, *shape)))
    log.close()
    path = write_report(tmp_path / "run")
    assert path.stat().st_size < 5_500_000
    assert "The 8 smallest domains are left out" in path.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")
@pytest.mark.parametrize("kind", ["demo", "hostile"])
def test_a_browser_draws_it_without_an_error(kind: str, demo_run: Path, tmp_path: Path) -> None:
    run = demo_run if kind == "demo" else write_hostile(tmp_path / "run")
    drawn = draw(write_report(run, tmp_path / "r.html"), tmp_path / "profile")
    assert drawn.count("<canvas") >= (11 if kind == "demo" else 5)
    assert "<img" not in drawn
