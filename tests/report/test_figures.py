"""The data behind the figures: what the page decodes equals what the run recorded."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.report import lines, maps, tiles
from moestro.routing import stats
from moestro.training import metrics


def decode(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def routing_of(loads: np.ndarray, biases: np.ndarray | None = None) -> np.ndarray:
    records = np.zeros(len(loads), metrics.routing_dtype(*loads.shape[1:]))
    records["step"] = np.arange(1, len(loads) + 1)
    records["loads"] = loads
    records["biases"] = 0 if biases is None else biases
    return records


def test_short_lines_are_kept_and_holes_are_null() -> None:
    x, y = np.arange(3.0), np.array([1.0, np.nan, 1 / 3])
    assert lines.downsample(x, y) == {"x": [0, 1, 2], "y": [1, None, 0.33333]}
    assert lines.line("a", x, np.full(3, np.nan)) == []


def test_long_lines_become_means_with_their_extremes() -> None:
    x, y = np.arange(1.0, 1001), np.arange(1000.0)
    y[500], y[7:10] = 1e6, np.nan
    short: dict[str, Any] = lines.downsample(x, y, limit=100)
    assert len(short["x"]) == len(short["y"]) == 100
    assert short["x"][-1] == 1000
    assert (short["y"][0], short["low"][0], short["high"][0]) == (3, 0, 6)
    assert short["high"][50] == 1e6
    assert (short["y"][99], short["low"][99], short["high"][99]) == (994.5, 990, 999)


def test_columns_take_numbers_only() -> None:
    column = lines.column([{"a": 1}, {"a": None}, {}, {"a": "x"}, {"a": 2.5}], "a")
    np.testing.assert_array_equal(column, [1, np.nan, np.nan, np.nan, 2.5])


def test_balance_charts_are_the_stats_of_every_step(demo_run: Path) -> None:
    routing, steps = metrics.read_routing(demo_run), metrics.read_metrics(demo_run)
    charts = lines.balance_charts(steps, routing, lines.column(steps, "tokens"))
    worst, mean = charts["max_vio"]["lines"]
    for index in (0, 63, 64, 119):
        vio = stats.max_vio(routing["loads"][index])
        assert worst["y"][index] == pytest.approx(vio.max(), rel=1e-4)
        assert mean["y"][index] == pytest.approx(steps[index]["max_vio"], rel=1e-4)
        assert charts["dead"]["lines"][0]["y"][index] == steps[index]["dead_experts"]


def test_domains_that_join_late_have_their_own_x() -> None:
    evals = [{"step": 1, "tokens": 10, "domains": {"a": {"loss": 2.0}}}]
    evals.append({"step": 2, "tokens": 20, "domains": {"a": {"loss": 1.0}, "b": {"loss": 3.0}}})
    drawn = lines.quality_charts([], evals)["loss"]["lines"]
    assert [(one["label"], one["y"]) for one in drawn] == [("a", [2, 1]), ("b", [None, 3])]


@pytest.mark.parametrize("steps", [7, 450])
def test_load_frames_decode_to_the_summed_loads(steps: int) -> None:
    loads = np.random.default_rng(1).poisson(0.6, (steps, 3, 300))
    loads[:, 1] = 0
    figure = maps.load_frames(routing_of(loads), ["1", "2", "3"], np.arange(1.0, steps + 1))
    frames = len(figure["steps"])
    assert frames == min(steps, 200)
    ratios = decode(figure["ratios"], "<u2", frames, 3, 300) / figure["unit"]
    for index, (first, last) in enumerate(figure["steps"]):
        expected = loads[first - 1 : last].sum(axis=0)
        restored = ratios[index] * np.array(figure["means"][index])[:, None]
        np.testing.assert_allclose(restored, expected, atol=0.1 + expected.max() * 0.05)
        np.testing.assert_array_equal(restored > 0, expected > 0)
    spans = [last - first + 1 for first, last in figure["steps"]]
    assert sum(spans) == steps


def test_one_expert_alone_does_not_overflow() -> None:
    loads = np.zeros((1, 1, 256), int)
    loads[0, 0, 9] = 5000
    figure = maps.load_frames(routing_of(loads), ["1"], np.ones(1))
    assert decode(figure["ratios"], "<u2", 256)[9] / figure["unit"] == pytest.approx(256, rel=1e-3)


def test_bias_lines_decode_to_the_biases() -> None:
    biases = np.random.default_rng(2).normal(0, 0.1, (500, 2, 6))
    biases[:, 1] = 0.25
    figure = maps.bias_lines(routing_of(np.zeros((500, 2, 6)), biases), ["1", "2"], np.arange(500.0))
    assert figure is not None and len(figure["tokens"]) == 400
    low, high = np.array(figure["low"])[:, None, None], np.array(figure["high"])[:, None, None]
    values = low + decode(figure["values"], "<u2", 2, 6, 400) / 65535 * (high - low)
    picked = np.array(figure["tokens"]).astype(int)
    np.testing.assert_allclose(values, biases[picked].transpose(1, 2, 0), atol=2e-5)
    assert picked[-1] == 499


def test_domain_figure_and_table_hold_the_specialisation() -> None:
    loads = np.random.default_rng(4).poisson(40, (3, 2, 8)).astype(np.uint64)
    loads[1, 1, 5] = 900
    figure = maps.domain_figure(["a", "b", "c"], ["1", "mtp.0"], 10, loads)
    expected = stats.specialisation(loads)
    np.testing.assert_allclose(decode(figure["log2"], "<i2", 3, 2, 8) / 1000, expected, atol=6e-4)
    np.testing.assert_array_equal(decode(figure["counts"], "<u4", 3, 2, 8), loads)
    best = maps.top_experts(["a", "b", "c"], ["1", "mtp.0"], loads)[1]["experts"][0]
    assert (best["layer"], best["expert"], best["tokens"]) == ("mtp.0", 5, 900)
    assert best["ratio"] == pytest.approx(2 ** expected[1, 1, 5])


def test_too_many_domains_keep_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "DOMAIN_CELLS", 8)
    loads = np.full((3, 1, 4), 5, np.uint64)
    loads[1] = 1
    figure = maps.domain_figure(["a", "b", "c"], ["1"], 1, loads)
    assert (figure["names"], figure["left_out"]) == (["a", "c"], 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (12345, "12.3K"),
        (999_949, "1.00M"),
        (671.03e9, "671B"),
        (None, "–"),
    ],
)
def test_counts_have_three_digits(value: float | None, text: str) -> None:
    assert tiles.format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(4.4, "4 s"), (59.7, "1 min 00 s"), (3723, "1 h 02 min"), (float("nan"), "–")]
)
def test_times_have_two_units(value: float, text: str) -> None:
    assert tiles.format_seconds(value) == text
