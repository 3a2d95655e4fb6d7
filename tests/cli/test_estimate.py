"""`moestro inspect` on whether a model runs here: rows that fit a terminal, and the numbers behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moestro import machine
from moestro.cli.estimate import format_speed, format_time
from moestro.config import build_config, load_preset
from moestro.engine.language_model import load, pack
from moestro.machine import Measurement
from moestro.model.size import training_flops

Call = Callable[..., tuple[int, str, str]]
SPEEDS = Measurement(2, 20.0, 1.0, True, fp32_gflops=100.0, bf16_gflops=200.0, seconds=1.0)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_bytes", lambda: 16 * 10**9)
    monkeypatch.setattr(machine, "measure_machine", lambda *_: SPEEDS)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 10**6)


def inspect(call: Call, *words: str | Path) -> dict[str, object]:
    code, out, _ = call("inspect", *words, "--json")
    assert code == 0
    return dict(json.loads(out))


def test_formats_that_fit_and_their_bounds(call: Call) -> None:
    """V2-Lite, 15.7B parameters: 16 GB hold it in int4 alone. 20 GB/s read its 2.66B active ones in int4 13 times."""
    found = inspect(call, "deepseek-v2-lite", "--context", "64")
    serving = {one["format"]: one for one in found["serving"]}  # type: ignore[attr-defined]
    assert {name: one["fits"] for name, one in serving.items()} == {
        "fp32": False, "bf16": False, "int8": False, "int4": True, "fp8": False,
    }  # fmt: skip
    assert serving["bf16"]["weights"] == pytest.approx(2 * 15.7e9, rel=0.01)
    assert serving["bf16"]["most_tokens_per_second"] == pytest.approx(20e9 / (2 * 2.45e9), rel=0.03)
    for one in serving.values():
        assert one["most_tokens_per_second"] == 20e9 / one["read"]


def test_time_to_train_is_arithmetic_over_the_best_speed(call: Call) -> None:
    found = inspect(call, "demo", "--tokens", "1000000")["training"]
    config = build_config(load_preset("demo"))
    assert found["least_seconds"] == pytest.approx(1e6 * training_flops(config.model, 256) / 200e9)  # type: ignore[index]


def test_rows_fit_a_terminal(call: Call) -> None:
    for model in ("deepseek-v3", "demo"):
        code, out, _ = call("inspect", model)
        assert code == 0 and max(map(len, out.splitlines())) <= 80
        assert [line.split()[0] for line in out.splitlines() if "<=" in line] == ["fp32", "bf16", "int8", "int4", "fp8"]


def test_nothing_is_measured_if_it_is_not_wanted(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_machine", None)
    found = inspect(call, "demo", "--no-measure")
    assert found["machine"]["measured"] is None and found["training"]["least_seconds"] is None  # type: ignore[index]
    assert {one["most_tokens_per_second"] for one in found["serving"]} == {None}  # type: ignore[attr-defined]
    assert "tokens/s" not in call("inspect", "demo", "--no-measure")[1]


def test_a_directory_is_counted_as_it_would_be_loaded(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    serving = inspect(call, tiny_run)["serving"]
    for one in serving:  # type: ignore[attr-defined]
        runtime = load(tiny_run, weights=one["format"]).runtime
        assert one["weights"] == sum(tensor.nbytes for tensor in runtime.tensors.values())
    pack(tiny_run, tmp_path / "packed", weights="int8")
    (only,) = inspect(call, tmp_path / "packed")["serving"]  # type: ignore[misc]
    assert (only["format"], only["private"]) == ("int8", False)


@pytest.mark.parametrize("words", [("--context", "9999999"), ("--context", "0"), ("--tokens", "0")])
def test_numbers_that_cannot_be_are_one_line(call: Call, words: tuple[str, str]) -> None:
    code, _, err = call("inspect", "demo", *words)
    assert code == 2 and err.count("\n") == 1


def test_speeds_and_times_are_readable() -> None:
    assert [format_speed(n) for n in (0.0123456, 12.34, 1234.5)] == ["0.0123", "12.3", "1,234"]
    assert [format_time(s) for s in (5, 200, 7300, 3 * 86400, 1e9)] == [
        "5 seconds", "3 minutes", "2 hours", "3 days", "32 years",
    ]  # fmt: skip
