"""The report of a comparison: its numbers, its plain words, and that hostile labels stay text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from comparisons import finished, realistic, record_of, write_files
from pages import CHROMIUM, HOSTILE, Page, check_needs_no_network, draw

from moestro.compare.results import Difference, Summary, Verdict, summarise
from moestro.errors import MoestroError
from moestro.report import write_comparison
from moestro.report.cell_figures import GRID_POINTS, dot_figures, finished_runs, learning_curves, merge_curves
from moestro.report.cell_tables import balance_table, domain_table, result_table, size_table
from moestro.report.comparison import sentence, sentences


def page_of(directory: Path, records: list[dict[str, Any]], kind: str = "tokens", **changes: Any) -> Page:
    return Page(write_comparison(write_files(directory, records, kind, **changes)))


def three_seeds() -> list[dict[str, Any]]:
    """Paired differences −0.02, −0.03, −0.04 of b to a, 0.01, −0.01, 0.03 of c to b."""
    values = {"a": (2.0, 2.1, 2.2), "b": (1.98, 2.07, 2.16), "c": (1.99, 2.06, 2.19)}
    return [finished(label, seed, bits) for label, row in values.items() for seed, bits in enumerate(row)]


def test_the_page_holds_numbers_computed_by_hand(tmp_path: Path) -> None:
    page = page_of(tmp_path, three_seeds())
    half = 4.303 * 0.01 / math.sqrt(3)  # the standard deviation of the differences is 0.01
    words = page.words("result")
    assert "2.1000 ± 0.1000" in words and "2.0700 ± 0.0900" in words
    assert f"−0.0300 −{0.03 + half:.4f} to −{0.03 - half:.4f}" in words
    assert "−0.0200 " in words and "baseline" in words
    # target 2.1; a curve falls a quarter of its end between points: b, seed 2 reaches 2.1 never, seed 1 at 4.942
    at = [4 + (2.1 - 1.25 * end) / (-0.25 * end) for end in (1.98, 2.07)]
    assert f"{sum(at) / 2:.2f}K 2 of 3 runs reach it" in words
    assert f"{sum(at) / 2 * 10:.1f} s 2 of 3 runs reach it" in words
    # b against c, the next: differences −0.01, 0.01, −0.03
    half = 4.303 * 0.02 / math.sqrt(3)
    expected = f"but −0.0100 against c is uncertain (95% interval −{0.01 + half:.4f} to +{half - 0.01:.4f}, 3 seeds)"
    assert "At equal tokens, no difference can be claimed: b has the lowest mean, 2.0700" in page.words("")
    assert expected in page.words("")


def test_a_clear_difference_is_claimed_and_bold(tmp_path: Path) -> None:
    records = [record for record in three_seeds() if record["label"] != "c"]
    page = page_of(tmp_path, records)
    half = 4.303 * 0.01 / math.sqrt(3)
    claim = f"b has the lowest mean, 2.0700 bits per byte: −0.0300 against a (95% interval −{0.03 + half:.4f}"
    assert f"At equal tokens, {claim}" in page.words("")
    (row,) = [row for row in result_table(summarise(records))["rows"] if row["label"] == "b"]
    assert [entry.strong for entry in row["entries"]] == [False, False, True, False, False, False]
    assert ("b", {}) in page.elements


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (("seconds", "to_target", "b", 252.0, "a", Difference(-30, -48, -12, 3)),
         "In wall clock, b reaches 2.5000 bits per byte first, after 4 min 12 s: "
         "−30.0 s against a (95% interval −48.0 s to −12.0 s, 3 seeds)."),
        (("tokens", "to_target", "b", 5_000_000, "a", Difference(-2e5, -3e5, 1e5, 4)),
         "Counted in tokens, no difference can be claimed: b reaches 2.5000 bits per byte first, after 5.00M tokens, "
         "but −200K against a is uncertain (95% interval −300K to +100K, 4 seeds)."),
        (("flops", "bits_per_byte", "b", 2.0, "a", Difference(-0.5, None, None, 1)),
         "At equal training FLOPs, no difference can be claimed from one seed: b has the lowest mean, "
         "2.0000 bits per byte (−0.5000 against a)."),
        (("seconds", "bits_per_byte", "b", 2.0, "a", None),
         "At equal training time, no difference can be claimed: b has the lowest mean, 2.0000 bits per byte, "
         "but shares no seed with a."),
        (("tokens", "bits_per_byte", "b", 2.0, None, None),
         "At equal tokens, b has the lowest mean, 2.0000 bits per byte; "
         "no other cell has a finished run to compare it with."),
        (("tokens", "to_target", "b", 900.0, None, None),
         "Counted in tokens, b reaches 2.5000 bits per byte first, after 900 tokens; "
         "no other cell reaches it in every finished run."),
    ],
)  # fmt: skip
def test_verdicts_in_words(verdict: Any, expected: str) -> None:
    assert sentence(Verdict(*verdict), summarise([finished("a", 0, 2.5), finished("b", 0, 2.0)])) == expected


def test_an_axis_without_a_verdict_is_named() -> None:
    summary = summarise([finished("a", 0, 2.5), finished("b", 0, 2.0)])
    by_tokens = Verdict("tokens", "bits_per_byte", "b", 2.0, None, None)
    first, second = sentences([by_tokens], summary)
    assert first == sentence(by_tokens, summary)
    assert second == "By seconds nothing can be said: not all seeds reach 2.5000 bits per byte."
    assert sentences([], Summary("a", None, ())) == ["No run has finished yet."]


def test_curves_of_unequal_seeds_meet_on_a_common_grid() -> None:
    long = {"tokens": [0, 10, 20], "seconds": [0, 1, 2], "flops": [0, 60, 120], "bits_per_byte": [4.0, 3.0, 2.0]}
    short = {"tokens": [5, 15], "seconds": [1, 2], "flops": [30, 90], "bits_per_byte": [5.0, 3.0]}
    line = merge_curves([long, short], "tokens")
    assert line is not None and len(line["x"]) == GRID_POINTS
    assert (line["x"][0], line["x"][-1]) == (5, 15)
    for x, mean, low, high in zip(line["x"], line["y"], line["low"], line["high"], strict=True):
        first, second = 4 - x / 10, 5 - (x - 5) / 5
        assert mean == pytest.approx((first + second) / 2, rel=1e-4)
        assert (low, high) == (pytest.approx(min(first, second), rel=1e-4), pytest.approx(max(first, second), rel=1e-4))


def test_curves_with_equal_points_keep_them_and_holes_are_left_out() -> None:
    curve: dict[str, list[Any]] = {
        "tokens": [1, 2, 3], "seconds": [4.0, 5.0, 6.0], "flops": [7, 8, 9], "bits_per_byte": [3.0, None, 2.0],
    }  # fmt: skip
    assert merge_curves([curve], "seconds") == {"x": [4, 6], "y": [3, 2]}
    other = curve | {"bits_per_byte": [2.0, 9.0, 1.0]}
    assert merge_curves([curve, curve | {"bits_per_byte": [2.0, None, 1.0]}], "flops") == {
        "x": [7, 9], "y": [2.5, 1.5], "low": [2, 1], "high": [3, 2],
    }  # fmt: skip
    assert merge_curves([curve | {"bits_per_byte": [None] * 3}], "tokens") is None
    apart = {name: [values[0]] for name, values in curve.items()} | {"tokens": [100]}
    assert merge_curves([other, apart], "tokens") == {"x": [51.5], "y": [2], "low": [1], "high": [3]}


def test_every_seed_is_a_dot_with_the_interval_of_its_cell() -> None:
    records = three_seeds()
    records[0] |= {"max_vio_batch": 0.5, "dropped": 0.0}
    figures = dot_figures(finished_runs(records))
    assert set(figures) == {"bits_per_byte", "max_vio_batch"}  # nothing was dropped, nothing is drawn
    row = figures["bits_per_byte"]["rows"][0]
    assert row["dots"] == [{"seed": 0, "value": 2.0}, {"seed": 1, "value": 2.1}, {"seed": 2, "value": 2.2}]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert row["interval"] == pytest.approx([2.1 - half, 2.1 + half])
    assert [one["label"] for one in figures["max_vio_batch"]["rows"]] == ["a"]


def test_domains_are_relative_to_the_first_cell() -> None:
    records = [finished("a", 0, 2.0), finished("b", 0, 1.9), finished("c", 0, 2.0, domains={"english": 2.1})]
    table = domain_table(summarise(records))
    assert table is not None and (table["reference"], table["limit"]) == ("a", "5.0%")
    cells = [[tuple(entry) for entry in row["entries"]] for row in table["rows"]]
    assert cells[0] == [("2.0000", "reference", False, None), ("1.0000", "reference", False, None)]
    assert cells[1] == [("1.9000", "−5.0%", False, -1.0), ("0.9500", "−5.0%", False, -1.0)]
    assert cells[2] == [("2.1000", "+5.0%", False, 1.0), ("–", "", False, None)]


def test_small_differences_of_domains_stay_pale() -> None:
    table = domain_table(summarise([finished("a", 0, 2.0), finished("b", 0, 2.002)]))
    assert table is not None and table["limit"] == "1.0%"
    assert table["rows"][1]["entries"][0].shade == 0.1


def test_dense_cells_have_no_balance_and_the_others_all_of_it() -> None:
    routed = {"max_vio_batch": 0.5, "max_vio_global": 0.25, "load_cv": 0.1, "entropy": 0.98, "dead_experts": 2}
    size = {"num_experts": 64, "top_k": 6, "num_shared_experts": 2, "expert_dim": 64, "flops_per_token": 2020}
    records = [finished("dense", 0, 2.0), finished("moe", 0, 1.9, **routed, **size, dropped=0.0125)]
    table = balance_table(summarise(records))
    assert table is not None
    assert [row["label"] for row in table["rows"]] == ["moe"]
    assert [entry.text for entry in table["rows"][0]["entries"]] == [
        "0.500",
        "0.250",
        "0.100",
        "0.9800",
        "2.0",
        "1.25%",
    ]
    dense, moe = size_table(summarise(records))["rows"]
    assert [entry.text for entry in dense["entries"]] == ["dense", "1.00K", "dense", "512", "2.00K", "640"]
    assert moe["entries"][2] == ("64", "6 chosen, 2 shared", False, None)
    assert moe["entries"][4].note == "1.010 × first"
    assert balance_table(summarise(records[:1])) is None


def test_mtp_agreement_has_a_column_only_when_it_was_measured() -> None:
    assert "MTP agreement" not in result_table(summarise([finished("a", 0, 2.0)]))["heads"]
    table = result_table(summarise([finished("a", 0, 2.0), finished("b", 0, 2.0, mtp_agreement=0.4321)]))
    assert [row["entries"][-1].text for row in table["rows"]] == ["–", "43.21%"]
    assert all(len(row["entries"]) == len(table["heads"]) for row in table["rows"])


def test_one_seed_has_neither_deviation_nor_interval(tmp_path: Path) -> None:
    page = page_of(tmp_path, [finished("a", 7, 2.0), finished("b", 7, 1.9)])
    assert "no difference can be claimed from one seed" in page.words("")
    assert "one pair, no interval" in page.words("result") and "±" not in page.words("result").split("Shows")[0]
    assert "One seed shows no scatter" in page.words("reading")
    assert page.data["dots"]["bits_per_byte"]["rows"][0]["interval"] is None
    assert "low" not in page.data["curves"]["tokens"]["lines"][0]


def test_nothing_finished_says_so_and_lists_what_failed(tmp_path: Path) -> None:
    page = page_of(tmp_path, [record_of("a", 0, "failed", error="out of memory"), record_of("b", 0, "waiting")])
    assert "No run has finished yet" in page.words("") and "0 of 2" in page.words("")
    assert "a 0 failed out of memory b 0 waiting –" in page.words("unfinished")
    assert not {"seeds", "curves", "domains"} & page.sections.keys()
    assert page.data == {"curves": {}, "dots": {}, "files": {}}


def test_cells_without_a_finished_seed_are_kept_in_the_tables(tmp_path: Path) -> None:
    records = [record_of("a", 0, "failed", error="boom"), finished("b", 0, 2.0), finished("c", 0, 1.9)]
    page = page_of(tmp_path, records)
    assert "a 0 1 failed" in page.words("result").replace("– ", "")
    assert [line["color"] for line in page.data["curves"]["flops"]["lines"]] == [1, 2]
    table = domain_table(summarise(records))
    assert table is not None and table["reference"] == "b"


def test_unfinished_runs_count_nowhere() -> None:
    records = [finished("a", 0, 2.0), finished("a", 1, 9.0, status="stopped")]
    runs = finished_runs(records)
    assert learning_curves(runs)["tokens"]["lines"][0]["y"][-1] == 2.0
    assert len(dot_figures(runs)["bits_per_byte"]["rows"][0]["dots"]) == 1


def test_every_section_is_drawn_explained_and_repeatable(tmp_path: Path) -> None:
    page = page_of(tmp_path, realistic(), "seconds")
    drawn = ["result", "seeds", "curves", "domains", "balance", "cells"]
    assert list(page.sections) == ["", *drawn, "unfinished", "reading", "request"]
    for name in drawn:
        assert "Shows " in page.words(name) and "Does not show " in page.words(name)
    assert {attrs["data-dots"] for _, attrs in page.elements if "data-dots" in attrs} == set(page.data["dots"])
    for expected in ("moestro compare --routers", "AMD EPYC 9B14", "torch 2.13.0", "7eb6c8d5", '"lr": 0.003', "10m"):
        assert expected in page.words("request")
    assert "17 of 18" in page.words("") and "not finite" in page.words("unfinished")


def write_hostile(directory: Path) -> Path:
    routed = {"max_vio_batch": 0.5, "max_vio_global": 0.5, "dropped": 0.1, "domains": {HOSTILE: 2.0}}
    records = [finished(HOSTILE, seed, 2.0 + seed, **routed, scheme=HOSTILE, overrides=[HOSTILE]) for seed in (0, 1)]
    records += [finished("b", 0, 1.9), record_of("b", 1, "failed", error=HOSTILE)]
    text = dict.fromkeys(("routers", "preset", "command", "machine", "commit"), HOSTILE)
    return write_files(directory, records, versions={HOSTILE: HOSTILE}, settings={HOSTILE: HOSTILE}, **text)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = Page(write_comparison(write_hostile(tmp_path)))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert all(HOSTILE in page.words(name) for name in ("", "result", "domains", "cells", "unfinished", "request"))
    assert page.data["curves"]["tokens"]["lines"][0]["label"] == HOSTILE


def test_the_file_needs_no_network_and_its_policy_matches(tmp_path: Path) -> None:
    check_needs_no_network(page_of(tmp_path, realistic()))


def test_the_place_and_what_is_no_comparison(tmp_path: Path) -> None:
    directory = write_files(tmp_path / "run", three_seeds())
    assert write_comparison(directory) == directory / "report.html"
    assert write_comparison(directory, tmp_path) == tmp_path / "report.html"
    with pytest.raises(MoestroError, match="holds no comparison"):
        write_comparison(tmp_path)
    (directory / "results.jsonl").unlink()
    with pytest.raises(MoestroError, match=r"has no results\.jsonl"):
        write_comparison(directory)
    (directory / "compare.json").write_text('{"version": 2}')
    with pytest.raises(MoestroError, match="not a comparison of version 1"):
        write_comparison(directory)
    (directory / "compare.json").write_text("{")
    with pytest.raises(MoestroError, match=r"compare\.json is damaged"):
        write_comparison(directory)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")
@pytest.mark.parametrize("kind", ["realistic", "hostile", "empty"])
def test_a_browser_draws_it_without_an_error(kind: str, tmp_path: Path) -> None:
    records = realistic() if kind == "realistic" else [record_of("a", 0, "waiting")]
    directory = write_hostile(tmp_path) if kind == "hostile" else write_files(tmp_path, records)
    drawn = draw(write_comparison(directory), tmp_path / "profile")
    assert drawn.count("<svg") == {"realistic": 4, "hostile": 4, "empty": 0}[kind]
    assert ("<canvas" in drawn) is (kind != "empty")
    assert "<img" not in drawn
