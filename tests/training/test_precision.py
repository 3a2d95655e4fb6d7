"""What `train.precision=auto` becomes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moestro import ops
from moestro.config import Config
from moestro.training import precision


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Seconds that the hot path will be said to take, in turn."""
    told: dict[str, list[float]] = {"fp32": [], "bf16": []}
    monkeypatch.setattr(precision, "time_hot_path", lambda config, tokens, dtype: told[dtype].pop(0))
    monkeypatch.setattr(ops, "multiplies_bf16", lambda: True)
    return told


@pytest.mark.parametrize(
    ("fp32", "bf16", "faster"),
    [([9.0, 3.0, 3.0], [9.0, 2.0, 4.0], "bf16"), ([9.0, 3.0, 1.5], [1.9, 2.0, 4.0], "fp32")],
)
def test_the_shortest_time_decides(
    times: dict[str, list[float]],
    make_config: Callable[..., Config],
    fp32: list[float],
    bf16: list[float],
    faster: str,
) -> None:
    times |= {"fp32": fp32, "bf16": bf16}
    assert precision.resolve_precision(make_config("train.precision=auto")) == faster


def test_a_choice_is_not_measured(times: dict[str, list[float]], make_config: Callable[..., Config]) -> None:
    assert precision.resolve_precision(make_config("train.precision=bf16")) == "bf16"


def test_where_bf16_is_slow_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config], times: dict[str, list[float]]
) -> None:
    monkeypatch.setattr(ops, "multiplies_bf16", lambda: False)
    assert precision.resolve_precision(make_config("train.precision=auto")) == "fp32"


@pytest.mark.parametrize("model", ["model.num_experts=8", "model.num_experts=0"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_hot_path_runs(make_config: Callable[..., Config], model: str, dtype: str) -> None:
    assert precision.time_hot_path(make_config(model).model, 64, dtype) > 0
