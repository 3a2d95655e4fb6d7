"""Sampling: greedy, the least set of top-p, top-k, min-p, penalties and biases by formula, seeds."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.engine import sampler as sampler_module
from moestro.engine.sampler import Sampler, SamplingError
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


def drawn_tokens(sampler: Sampler, logits: torch.Tensor) -> set[int]:
    return {sampler.choose(logits) for _ in range(2000)}


def test_top_k_and_min_p_and_top_p_must_all_let_a_token_pass() -> None:
    logits = torch.tensor([2.0, 0.3, 1.4, -0.5, 1.9, 0.9])  # likeliest first: 0, 4, 2, 5, 1, 3
    p = logits.softmax(0).tolist()
    assert drawn_tokens(Sampler(1.0, 1.0, 0, top_k=3), logits) == {0, 4, 2}
    assert drawn_tokens(Sampler(1.0, 1.0, 0, top_k=100), logits) == set(range(6))
    for min_p in (0.1, 0.3, 0.5, 1.0):
        expected = {token for token in range(6) if p[token] >= min_p * max(p)}
        assert drawn_tokens(Sampler(1.0, 1.0, 0, min_p=min_p), logits) == expected
    assert drawn_tokens(Sampler(1.0, 0.6, 0, top_k=5, min_p=0.01), logits) == least_set(p, 0.6)
    assert drawn_tokens(Sampler(1.0, 1.0, 0, top_k=2, min_p=0.5), logits) == {0, 4}
    assert drawn_tokens(Sampler(1.0, 1.0, 0, top_k=1), logits) == {0}


def chi_square_limit(freedom: int) -> float:
    """What chance alone exceeds once in 30000 times (Wilson and Hilferty: the cube root is nearly normal)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4 * spread**0.5) ** 3


def exact_shares(logits: torch.Tensor, temperature: float, kept: set[int]) -> torch.Tensor:
    p = (logits / temperature).softmax(0)
    mask = torch.tensor([token in kept for token in range(len(p))])
    return p.where(mask, 0.0) / p[mask].sum()


@pytest.mark.parametrize("closeness", [0.0, 0.4, 1.0])
def test_checked_drafts_have_the_distribution_of_the_target(closeness: float) -> None:
    generator = torch.Generator().manual_seed(3)
    target, other = torch.randn(2, 8, generator=generator) * 1.5
    guess, draws = closeness * target + (1 - closeness) * other, 5000
    sampler = Sampler(0.8, 0.95, 1, top_k=6)
    counts, right = torch.zeros(8), 0
    for _ in range(draws):
        draft = sampler.propose(guess, (), ())
        token = sampler.choose(target, draft=draft)
        counts[token] += 1
        right += token == draft[0]
    p, q = ((x / 0.8).softmax(0).tolist() for x in (target, guess))
    ranked = sorted(range(8), key=lambda i: -p[i])
    p_exact = exact_shares(target, 0.8, least_set(p, 0.95) & set(ranked[:6]))
    q_exact = exact_shares(guess, 0.8, least_set(q, 0.95) & set(sorted(range(8), key=lambda i: -q[i])[:6]))
    assert not counts[p_exact == 0].any()
    kept = p_exact > 0
    statistic = float(((counts - draws * p_exact)[kept] ** 2 / (draws * p_exact[kept])).sum())
    assert statistic < chi_square_limit(int(kept.sum()) - 1)
    overlap = float(torch.minimum(p_exact, q_exact).sum())  # how often the best possible check accepts
    assert abs(right / draws - overlap) < 5 * (overlap * (1 - overlap) / draws) ** 0.5 + 1e-6
    assert (right == draws) == (closeness == 1.0)


def test_greedy_drafts_count_if_they_are_the_likeliest() -> None:
    sampler, logits = Sampler(0.0, 1.0, 0), torch.tensor([0.0, 3.0, 1.0])
    assert sampler.propose(logits, (), ()) == (1, None)
    assert [sampler.choose(logits, draft=(token, None)) for token in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e300])
def test_extreme_temperatures_give_numbers(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, -math.inf, 30000.0])
    drawn = drawn_tokens(Sampler(temperature, 1.0, 0), logits)
    assert drawn == ({3} if temperature < 1 else {0, 1, 3})


def test_a_large_vocabulary_is_cut_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    for options in ({"top_k": 7}, {"top_k": 2500}, {"min_p": 0.2}, {"min_p": 1e-4}, {"top_k": 50, "min_p": 0.1}):
        for top_p in (0.01, 0.5, 0.99, 1.0):
            sampler = Sampler(0.7, top_p, 0, **options)
            monkeypatch.setattr(sampler_module, "CANDIDATES", 3000)
            expected = sampler.weigh(logits)
            monkeypatch.setattr(sampler_module, "CANDIDATES", 64)
            torch.testing.assert_close(sampler.weigh(logits), expected, rtol=1e-6, atol=0)
            p = (logits / 0.7).softmax(0).tolist()
            ranked = sorted(range(3000), key=lambda token: -p[token])
            kept = set(ranked[: options.get("top_k", 3000)])
            kept &= {token for token in ranked if p[token] >= options.get("min_p", 0.0) * p[ranked[0]]}
            kept &= least_set(p, top_p) if top_p < 1 else kept
            assert set(expected.nonzero().flatten().tolist()) == kept


def test_draws_follow_probabilities_down_to_the_smallest() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    sampler = Sampler(1.0, 1.0, 0)
    drawn = [sampler._draw(p) for _ in range(4000)]
    for token, share in enumerate(p.tolist()):
        assert abs(drawn.count(token) / 4000 - share) <= 5 * (share * (1 - share) / 4000) ** 0.5


def test_penalties_that_overflow_are_named() -> None:
    with pytest.raises(SamplingError, match="infinite"):
        Sampler(1.0, 1.0, 0, repetition_penalty=1e-300).choose(torch.tensor([2.0, 1.0]), [0])


def test_penalties_and_biases_follow_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator)
    prompt, generated, bias = [1, 2, 2], [2, 5, 5, 5, 7], {7: 3.0, 11: -1.5}
    settings = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.25}
    sampler = Sampler(0.0, 1.0, 0, **settings, logit_bias=bias)
    expected = []
    for token, value in enumerate(logits.tolist()):
        if token in prompt + generated:
            value = value / 1.3 if value > 0 else value * 1.3
        value -= 0.25 * generated.count(token) + 0.4 * (token in generated)
        expected.append(value + bias.get(token, 0.0))
    before = logits.clone()
    torch.testing.assert_close(sampler.penalize(logits, prompt, generated), torch.tensor(expected))
    assert sampler.choose(logits, prompt, generated) == expected.index(max(expected))
    assert torch.equal(logits, before)
    assert Sampler(0.0, 1.0, 0).penalize(logits, prompt, generated) is logits
