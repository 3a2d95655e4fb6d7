"""The specification of routing against loops over Python numbers, ties included, and the kernels against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro.ops.serving.reference import FIXED_ORDER
from moestro.ops.serving.rows import route
from moestro.routing.selection import Selection, add_bias, choose, find_best, score_experts, weigh

GROUPS = [(1, 1, 2), (4, 2, 2), (4, 2, 1), (12, 5, 1)]  # groups, kept, group_best


def make_selection(num_experts: int, top_k: int, groups: int = 1, kept: int = 1, group_best: int = 2) -> Selection:
    plain: dict[str, Any] = {
        "score": "sigmoid", "scale": 2.5, "multiply": False, "normalize": True, "hashed": False, "layer": 0,
    }  # fmt: skip
    return Selection(
        bias=torch.zeros(num_experts),
        top_k=top_k,
        num_groups=groups,
        top_k_groups=kept,
        group_best=group_best,
        **plain,
    )


def best(values: list[float], count: int) -> list[int]:
    """Indices of the largest values, the lowest of equal ones first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choose_slowly(values: list[float], s: Selection) -> list[int]:
    size = len(values) // s.num_groups
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    kept = best([sum(sorted(group)[::-1][: s.group_best]) for group in groups], s.top_k_groups)
    inside = [i for i in range(len(values)) if i // size in kept]
    return [inside[i] for i in best([values[i] for i in inside], s.top_k)]


@pytest.mark.parametrize(("groups", "kept", "group_best"), GROUPS)
@pytest.mark.parametrize("levels", [1, 2, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lowest_of_equal_experts_and_groups_is_chosen(
    groups: int, kept: int, group_best: int, levels: int, dtype: torch.dtype
) -> None:
    s = make_selection(12, 4, groups, kept, group_best)
    values = torch.randint(0, levels, (60, 12), generator=torch.Generator().manual_seed(levels)) / 4 - 0.25
    ids = choose(values.to(dtype), s)
    assert ids.tolist() == [choose_slowly(row, s) for row in values.tolist()]


@pytest.mark.parametrize(("groups", "kept", "group_best"), GROUPS)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_training_and_serving_agree_on_ties(groups: int, kept: int, group_best: int, levels: int) -> None:
    """Saturated and equal scores, where a sum of a group is exact."""
    s = make_selection(12, 4, groups, kept, group_best)
    logits = torch.randint(0, levels, (60, 12), generator=torch.Generator().manual_seed(levels)) * 200.0 - 200
    trained = choose(add_bias(score_experts(logits, s.score), s), s)
    assert torch.equal(route(logits, s)[0], trained)


def test_signed_zeros_are_equal_and_what_is_not_a_number_comes_first() -> None:
    values = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0], [1.0, torch.nan, torch.inf]])
    assert find_best(values, 3).tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 0]]
    assert find_best(torch.full((1, 3), -torch.inf), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("group_best", [1, 2])
def test_no_expert_of_an_excluded_group_wins_when_all_scores_are_negative(group_best: int) -> None:
    """With excluded groups at 0.0, as some implementations have it, they would win here."""
    values = torch.tensor([[-0.9, -0.8, -0.1, -0.2]])
    assert choose(values, make_selection(4, 2, 2, 1, group_best))[0].tolist() == [2, 3]
    masked_with_zero = torch.tensor([[0.0, 0.0, -0.1, -0.2]]).topk(2).indices
    assert sorted(masked_with_zero[0].tolist()) == [0, 1]


def test_two_middling_experts_outweigh_one_good_one_in_v3_only() -> None:
    values = torch.tensor([[0.9, 0.0, 0.6, 0.6]])
    chosen = {group_best: choose(values, make_selection(4, 1, 2, 1, group_best)).item() for group_best in (1, 2)}
    assert chosen == {1: 0, 2: 2}


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus", "constant"])
def test_fixed_order_is_the_same_arithmetic(score: str) -> None:
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)) * 3
    s = make_selection(12, 4)
    scores = score_experts(logits, score)
    torch.testing.assert_close(score_experts(logits, score, FIXED_ORDER), scores)
    ids = choose(scores, s)
    torch.testing.assert_close(weigh(scores, ids, s, FIXED_ORDER), weigh(scores, ids, s))


def test_an_unknown_score_function_is_an_error() -> None:
    with pytest.raises(ValueError, match="relu"):
        score_experts(torch.zeros(1, 2), "relu")
