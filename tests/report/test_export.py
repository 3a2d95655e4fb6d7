"""Figures as files: SVG that XML readers take, CSV with the numbers of the run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from comparisons import finished, write_files

from moestro.errors import MoestroError
from moestro.report.comparison import write_comparison_figures
from moestro.report.export import PAGE_BYTES, Export, export_chart, for_page, to_csv
from moestro.report.html import write_run_figures
from moestro.report.svg import draw_lines, format_tick, ticks
from moestro.training.metrics import read_metrics, read_routing

NAME = "{http://www.w3.org/2000/svg}"


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"), newline="")))


def chart_of(*labels: str, **more: Any) -> dict[str, Any]:
    lines = [
        {"label": label, "role": "plain", "color": at, "x": [1, 2, 3], "y": [1.0, None, 2.5]}
        for at, label in enumerate(labels)
    ]
    return {"title": "Bits", "unit": "bits per byte", "lines": lines} | more


def test_every_figure_of_a_run_is_written_with_axis_titles(demo_run: Path, tmp_path: Path) -> None:
    paths = write_run_figures(demo_run, tmp_path / "deep" / "figures")
    names = {path.stem for path in paths}
    assert {"bits", "loss", "lr", "max_vio", "loads", "domains", "biases", "mtp_agreement"} <= names
    assert len(paths) == 2 * len(names)
    for name in names:
        texts = [
            node.text for node in ElementTree.parse(tmp_path / "deep" / "figures" / f"{name}.svg").iter(f"{NAME}text")
        ]
        titles = {"loads": {"expert", "layer"}, "domains": {"expert", "domain"}}.get(name, {"tokens trained"})
        assert titles <= set(texts)


def test_the_table_of_a_line_is_the_log(demo_run: Path, tmp_path: Path) -> None:
    write_run_figures(demo_run, tmp_path)
    rows = [row for row in rows_of(tmp_path / "loss.csv") if row["line"] == "training batch"]
    records = read_metrics(demo_run)
    assert [float(row["tokens trained"]) for row in rows] == [record["tokens"] for record in records]
    assert [float(row["nats per token"]) for row in rows] == pytest.approx([r["loss_main"] for r in records], rel=1e-4)


def test_the_table_of_loads_is_the_routing(demo_run: Path, tmp_path: Path) -> None:
    write_run_figures(demo_run, tmp_path)
    loads = read_routing(demo_run)["loads"].astype(float)
    shares = loads / loads.mean(axis=-1, keepdims=True)
    found = np.array([float(row["load / mean"]) for row in rows_of(tmp_path / "loads.csv")]).reshape(shares.shape)
    np.testing.assert_allclose(found, shares, rtol=1e-3, atol=1e-3)


def test_the_figures_of_a_comparison_are_written(tmp_path: Path) -> None:
    records = [
        finished(label, seed, bits + 0.01 * seed) for label, bits in (("a", 2.0), ("=b", 1.9)) for seed in (0, 1)
    ]
    write_comparison_figures(write_files(tmp_path / "c", records), tmp_path / "figures")
    rows = rows_of(tmp_path / "figures" / "bits_per_byte.csv")
    assert [(row["line"], row["seed"], float(row["bits per byte"])) for row in rows] == [
        ("a", "0", 2.0), ("a", "1", 2.01), ("'=b", "0", 1.9), ("'=b", "1", 1.91),
    ]  # fmt: skip
    assert {path.stem for path in (tmp_path / "figures").glob("curves-*.svg")} == {
        "curves-tokens", "curves-flops", "curves-seconds",
    }  # fmt: skip


def test_hostile_names_stay_text() -> None:
    svg = draw_lines(chart_of("<script>x</script>&", "a\x1b[31m\x00b"))
    texts = [node.text for node in ElementTree.fromstring(svg).iter(f"{NAME}text")]
    assert "<script>x</script>&" in texts and "a�[31m�b" in texts
    assert not list(ElementTree.fromstring(svg).iter(f"{NAME}script"))


def test_formulas_get_an_apostrophe_and_numbers_do_not() -> None:
    assert to_csv([("=1+1", "-0.5", "@x", -3)]) == "'=1+1,-0.5,'@x,-3\r\n"


def test_gaps_break_a_line_and_dots_are_not_joined() -> None:
    broken = chart_of("a")
    broken["lines"][0] |= {"x": [1, 2, 3, 4, 5], "y": [1.0, 2.0, None, 2.0, 3.0]}
    assert draw_lines(broken).count("<polyline") == 2
    broken["lines"][0]["dots"] = True
    assert draw_lines(broken).count("<polyline") == 0 and draw_lines(broken).count("<circle") == 4


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.2), (1234, 9876), (2e-4, 3e-3), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 6)
    assert 1 <= len(found) <= 8 and all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    if len(found) > 1:
        np.testing.assert_allclose(np.diff(found), found[1] - found[0], rtol=1e-6)


def test_numbers_of_axes() -> None:
    assert [format_tick(value) for value in (0, 0.25, 2000, 10_000, -1.5, 0.0003)] == [
        "0",
        "0.25",
        "2K",
        "10K",
        "−1.5",
        "0.0003",
    ]
    assert format_tick(0.125, percent=True) == "12.5%"


def test_a_figure_too_large_for_the_page_is_left_to_the_command_line() -> None:
    small, large = export_chart(chart_of("a")), Export("x" * PAGE_BYTES, "y")
    assert for_page({"small": small, "large": large}).keys() == {"small"}


def test_a_place_that_cannot_be_written_is_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MoestroError, match=r"cannot write figures to .*file"):
        write_run_figures(make_run(steps=4, eval_every=2), tmp_path / "file" / "x")
