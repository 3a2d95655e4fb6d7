"""A score function is one entry: it trains and is served, and an entry that forgets something raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moestro.config import Config, build_config
from moestro.errors import ConfigError
from moestro.ops.abi import SCORES as NUMBERS
from moestro.routing.selection import score_experts
from moestro.scores import SCORES, Arithmetic, ScoreFunction
from moestro.training.loop import train
from moestro.training.metrics import read_metrics

Make = Callable[..., Config]


def arctangent(logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    return 0.5 + arithmetic.apply(torch.arctan, logits) / torch.pi


def test_one_entry_is_enough_to_train_and_to_write(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORES, "arctangent", ScoreFunction(arctangent))
    config = make_config("train.steps=3", "model.router.score=arctangent")
    outcome = train(config, tmp_path / "run", quiet=True)
    assert outcome.samples and len(read_metrics(tmp_path / "run")) == 3
    plain = train(make_config("train.steps=3"), tmp_path / "plain", quiet=True)
    assert plain.evaluation is not None and outcome.evaluation is not None
    assert plain.evaluation["bits_per_byte"] != outcome.evaluation["bits_per_byte"]


def test_the_router_learns_through_a_new_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "arctangent", ScoreFunction(arctangent))
    logits = torch.randn(5, 8, requires_grad=True)
    score_experts(logits, "arctangent").square().sum().backward()
    expected = 2 * (0.5 + logits.arctan() / torch.pi) / (torch.pi * (1 + logits**2))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected.detach())


@pytest.mark.parametrize(
    "broken", [lambda x, a: torch.ones_like(x), lambda x, a: a.softmax(x).detach(), lambda x, a: a.sum(x)]
)
def test_a_function_that_is_constant_in_secret_raises(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[Tensor, Arithmetic], Tensor]
) -> None:
    monkeypatch.setitem(SCORES, "broken", ScoreFunction(broken))
    with pytest.raises(ValueError, match="'broken' must give one score a logit, with its gradient"):
        score_experts(torch.randn(5, 8, requires_grad=True), "broken")


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="no score function 'relu'; there are: sigmoid, softmax, sqrt_softplus"):
        build_config({"model": {"router": {"score": "relu"}}})
    with pytest.raises(ValueError, match="unknown score function 'relu'"):
        score_experts(torch.zeros(1, 2), "relu")


def test_the_kernels_know_only_functions_that_exist() -> None:
    assert NUMBERS.keys() <= SCORES.keys()
