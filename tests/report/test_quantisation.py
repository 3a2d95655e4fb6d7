"""The part of a report about FP8: means, worst matrices and ranges, and no trace of it in other runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, Page, check_needs_no_network

from moestro.report import quantisation, write_report
from moestro.training.metrics import RunLog, read_fp8


def stats(error: float, low: float = 1e-4, high: float = 2e-4) -> dict[str, float]:
    return {"error": error, "zeros": error / 100, "top": 0.0078125, "low": low, "high": high}


def layer(error: float, name: str = "attention.q") -> dict[str, Any]:
    worst = {"weights": stats(error), "inputs": stats(2 * error, low=5e-7), "gradients": stats(math.nan)}
    return {name: worst, "ffn.down": {kind: stats(0.02, high=0.5) for kind in quantisation.KINDS}}


@pytest.fixture
def fp8_run(make_run: Callable[..., Path]) -> Path:
    """A run with two measurements; its first layer has a hostile matrix."""
    run = make_run(steps=50)
    log = RunLog(run, [], 0)
    for step in (25, 50):
        error = 0.03 if step == 25 else 0.04
        log.fp8({"step": step, "tokens": step * 8192, "layers": {"0": layer(error, HOSTILE), "mtp.0": layer(0.05)}})
    log.close()
    return run


def test_the_table_has_means_worst_matrices_and_ranges(fp8_run: Path) -> None:
    (first, rows), (second, _) = quantisation.fp8_table(read_fp8(fp8_run)[-1])
    assert (first, second) == ("0", "mtp.0")
    assert rows[0] == ("weights", "3.0%", f"4.0% {HOSTILE}", "0.030%", "0.78%", "1.0e−4 to 5.0e−1")
    assert rows[1][:3] == ("inputs", "5.0%", f"8.0% {HOSTILE}") and rows[1].scales == "5.0e−7 to 5.0e−1"
    assert rows[2][:3] == ("gradients", "2.0%", "2.0% ffn.down")


def test_the_charts_are_means_of_all_matrices(fp8_run: Path) -> None:
    weights, inputs, gradients = quantisation.fp8_charts(read_fp8(fp8_run))["fp8_error"]["lines"]
    assert weights["x"] == [25 * 8192, 50 * 8192]
    assert weights["y"] == pytest.approx([(0.03 + 0.05 + 0.04) / 4, (0.04 + 0.05 + 0.04) / 4], rel=1e-4)
    assert inputs["y"] == pytest.approx([(0.06 + 0.10 + 0.04) / 4, (0.08 + 0.10 + 0.04) / 4], rel=1e-4)
    assert gradients["y"] == pytest.approx([0.02, 0.02])


def test_the_report_of_an_fp8_run_has_the_section(fp8_run: Path) -> None:
    page = Page(write_report(fp8_run))
    check_needs_no_network(page)
    assert {"fp8_error", "fp8_zeros"} <= page.data["charts"].keys()
    assert "at step 50" in page.words("fp8") and "0.78% 1.0e−4 to 5.0e−1" in page.words("fp8")
    assert page.text.count("Does not show") == page.text.count("Shows") == 9
    assert "img" not in [tag for tag, _ in page.elements]


def test_other_reports_do_not_mention_it(demo_run: Path, tmp_path: Path) -> None:
    page = Page(write_report(demo_run, tmp_path / "r.html"))
    assert "fp8" not in page.sections and "FP8" not in page.text and "fp8_error" not in page.data["charts"]


def test_a_matrix_without_numbers_is_a_dash() -> None:
    none = dict.fromkeys(("error", "zeros", "top", "low", "high"))
    record = {"step": 1, "tokens": 9, "layers": {"0": {"q": dict.fromkeys(quantisation.KINDS, none)}}}
    assert quantisation.fp8_table(record) == [("0", [(kind, *"–––––") for kind in quantisation.KINDS])]
    assert quantisation.fp8_charts([record])["fp8_error"]["lines"] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0%"), (0.0261, "2.6%"), (0.1234, "12%"), (0.00012, "0.012%"), (1e-6, "<0.001%"), (math.nan, "–")],
)
def test_shares_have_two_digits(value: float, text: str) -> None:
    assert quantisation.format_share(value) == text
