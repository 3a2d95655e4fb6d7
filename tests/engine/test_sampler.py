"""Sampling: greedy, the least set of top-p, seeds."""

from __future__ import annotations

import pytest
import torch

from moestro.engine.sampler import Sampler
from moestro.errors import ConfigError


def least_set(probabilities: list[float], top_p: float) -> set[int]:
    """The fewest likeliest tokens whose mass reaches top_p."""
    chosen, mass = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if mass >= top_p:
            break
        chosen.add(token)
        mass += probabilities[token]
    return chosen


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.55, 0.9, 1.0])
def test_top_p_draws_from_the_least_set_and_all_of_it(top_p: float) -> None:
    logits = torch.tensor([2.0, 0.3, 1.4, -0.5, 1.9, 0.9])
    sampler = Sampler(1.3, top_p, seed=0)
    drawn = [sampler.choose(logits) for _ in range(3000)]
    probabilities = (logits / 1.3).softmax(0).tolist()
    kept = least_set(probabilities, top_p)
    assert set(drawn) == kept
    mass = sum(probabilities[i] for i in kept)
    for token in kept:  # within five standard deviations
        share = probabilities[token] / mass
        assert abs(drawn.count(token) / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5 + 1e-9


def test_temperature_zero_is_greedy_and_seeds_repeat() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert Sampler(0.0, 1.0, 0).choose(logits) == int(logits.argmax())
    one, two, three = ([s.choose(logits) for _ in range(20)] for s in (Sampler(1.0, 0.9, seed) for seed in (4, 4, 5)))
    assert one == two != three


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5), (float("nan"), 1.0)])
def test_impossible_settings_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ConfigError):
        Sampler(temperature, top_p, 0)
