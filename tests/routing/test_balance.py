"""The bias rule and the sequence-wise loss against loops."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from moestro.routing.balance import count_loads, sequence_balance_loss, updated_bias


def test_bias_moves_towards_the_mean_and_keeps_on_it() -> None:
    bias = torch.tensor([0.5, -0.5, 0.0, 0.25])
    moved = updated_bias(bias, torch.tensor([9, 1, 5, 5]), 0.125)
    assert moved.tolist() == [0.375, -0.375, 0.0, 0.25]
    assert bias.tolist() == [0.5, -0.5, 0.0, 0.25]


def test_bias_rule_is_exact_for_means_that_are_no_integers_and_for_huge_counts() -> None:
    assert updated_bias(torch.zeros(3), torch.tensor([3, 3, 4]), 1.0).tolist() == [1.0, 1.0, -1.0]
    huge = 2**40
    assert updated_bias(torch.zeros(4), torch.tensor([huge, huge, huge, huge]), 1.0).tolist() == [0.0] * 4
    assert updated_bias(torch.zeros(2), torch.tensor([huge + 1, huge - 1]), 1.0).tolist() == [-1.0, 1.0]


def test_loads_count_valid_rows() -> None:
    ids = torch.tensor([[0, 1], [1, 3], [1, 0]])
    assert count_loads(ids, 5).tolist() == [2, 3, 0, 1, 0]
    assert count_loads(ids, 5, torch.tensor([True, False, True])).tolist() == [2, 2, 0, 0, 0]


def balance_slowly(scores: list[list[list[float]]], valid: list[list[bool]], top_k: int) -> float:
    """V3 eq. 17–20 without α, summed over sequences."""
    total = 0.0
    for sequence, mask in zip(scores, valid, strict=True):
        tokens = [t for t, keep in zip(sequence, mask, strict=True) if keep]
        num_experts, length = len(sequence[0]), max(len(tokens), 1)
        for expert in range(num_experts):
            chosen = sum(expert in sorted(range(num_experts), key=lambda i: -t[i])[:top_k] for t in tokens)
            f = num_experts / (top_k * length) * chosen
            p = sum(t[expert] / sum(t) for t in tokens) / length
            total += f * p
    return total


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_loss_equals_loops(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 7, 6, generator=generator).sigmoid()
    valid = torch.rand(3, 7, generator=generator) > 0.3 if masked else torch.ones(3, 7, dtype=torch.bool)
    valid[2] = not masked  # a sequence without a single token must not divide by zero
    loss = sequence_balance_loss(scores.flatten(0, 1), 2, 3, valid.flatten() if masked else None)
    assert float(loss) == pytest.approx(balance_slowly(scores.tolist(), valid.tolist(), 2), rel=1e-5)


def test_gradient_of_the_sequence_loss_pushes_down_the_overloaded() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.3, 0.2]], requires_grad=True)
    sequence_balance_loss(scores, 1, 1).backward()
    assert scores.grad is not None
    assert bool((scores.grad[:, 0] > 0).all()) and bool((scores.grad[:, 1:] < 0).all())


def biases_slowly(bias: list[float], loads: list[int], speed: float, rule: str) -> list[float]:
    """arXiv 2408.15664: e_i = mean − load_i; b += γ sign(e), in the multiplicative form too, or γ e / mean."""
    mean, moved = Fraction(sum(loads), len(loads)), []
    for b, load in zip(bias, loads, strict=True):
        e = mean - load
        step = e / mean if rule == "error" and mean else Fraction((e > 0) - (e < 0))
        moved.append(b + speed * float(step))
    return moved


@pytest.mark.parametrize("rule", ["sign", "error", "multiplicative"])
@pytest.mark.parametrize(
    "loads", [[0, 0, 0], [7], [5, 5, 5, 5], [100, 0, 0, 0], [3, 3, 4], [10**6, 10**6 + 1], [12, 7, 0, 31, 2, 9]]
)
def test_every_bias_rule_equals_its_formula(rule: str, loads: list[int]) -> None:
    bias = torch.linspace(-0.5, 0.75, len(loads))
    before = bias.clone()
    moved = updated_bias(bias, torch.tensor(loads), 0.01, rule)
    assert moved.dtype == torch.float32 and torch.equal(bias, before)
    assert moved.tolist() == pytest.approx(biases_slowly(before.tolist(), loads, 0.01, rule), abs=1e-7)


def test_error_rule_moves_in_proportion_and_conserves_the_sum() -> None:
    moved = updated_bias(torch.zeros(4), torch.tensor([8, 4, 4, 0]), 0.5, "error")
    assert moved.tolist() == [-0.5, 0.0, 0.0, 0.5]
    random = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(0))
    assert float(updated_bias(torch.zeros(9), random, 1.0, "error").sum()) == pytest.approx(0.0, abs=1e-5)
