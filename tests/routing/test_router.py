"""The router against a transcription of the papers in loops over Python numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moestro.config import ModelConfig, build_config
from moestro.routing.router import Router, select_experts


def make_router(**changes: Any) -> tuple[ModelConfig, Router]:
    shape = {"hidden_dim": 12, "num_experts": 16, "top_k": 4, "num_groups": 4, "top_k_groups": 2}
    config = build_config({"model": shape | changes}).model
    router = Router(config)
    generator = torch.Generator().manual_seed(1)
    router.weight.data.normal_(generator=generator)
    router.bias.copy_(torch.randn(16, generator=generator) * 0.4 - 1.0)
    return config, router


def best(numbers: list[float], count: int) -> list[int]:
    return sorted(range(len(numbers)), key=lambda i: -numbers[i])[:count]


def route_slowly(config: ModelConfig, x: list[float], weight: list[list[float]], bias: list[float]) -> dict[int, float]:
    """Expert -> weight of one token: V3 eq. 12–16 with node-limited routing; V2 with softmax and the group maximum."""
    affinity = [sum(a * b for a, b in zip(row, x, strict=True)) for row in weight]
    if config.router.score == "sigmoid":
        scores = [1 / (1 + math.exp(-a)) for a in affinity]
    else:
        total = sum(math.exp(a) for a in affinity)
        scores = [math.exp(a) / total for a in affinity]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // config.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
    counted = 2 if config.router.group_score == "top2" else 1
    group_scores = [sum(sorted((biased[i] for i in g), reverse=True)[:counted]) for g in groups]
    reachable = [i for g in best(group_scores, config.top_k_groups) for i in groups[g]]
    chosen = sorted(reachable, key=lambda i: -biased[i])[: config.top_k]
    divisor = sum(scores[i] for i in chosen) if config.router.normalize else 1.0
    return {i: scores[i] / divisor * config.router.scale for i in chosen}


V2 = {"score": "softmax", "group_score": "max", "normalize": False, "scale": 16.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": V2},
        {"num_groups": 1, "top_k_groups": 1},
        {"top_k_groups": 1},
        {"router": {"normalize": False}},
    ],
    ids=["v3", "v2", "no groups", "one group", "not normalised"],
)
def test_routes_equal_the_papers(changes: dict[str, Any]) -> None:
    config, router = make_router(**changes)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    routes = router(x)
    for token in range(50):
        slow = route_slowly(config, x[token].tolist(), router.weight.tolist(), router.bias.tolist())
        ids = routes.ids[token].tolist()
        assert sorted(ids) == sorted(slow)
        assert routes.weights[token].tolist() == pytest.approx([slow[i] for i in ids], rel=1e-4)


def test_no_expert_of_an_excluded_group_wins_when_all_scores_are_negative() -> None:
    """With excluded groups at 0.0, as some implementations have it, they would win here."""
    choice = torch.tensor([[-0.9, -0.8, -0.1, -0.2]])
    ids = select_experts(choice, top_k=2, num_groups=2, top_k_groups=1, group_score="top2")
    assert sorted(ids[0].tolist()) == [2, 3]
    masked_with_zero = torch.tensor([[0.0, 0.0, -0.1, -0.2]]).topk(2).indices
    assert sorted(masked_with_zero[0].tolist()) == [0, 1]


def test_weights_are_positive_and_sum_to_the_scale_whatever_the_bias() -> None:
    _, router = make_router()
    routes = router(torch.randn(20, 12, generator=torch.Generator().manual_seed(3)))
    assert bool((routes.weights > 0).all())
    torch.testing.assert_close(routes.weights.sum(-1), torch.full((20,), 2.5))
    assert not router.bias.requires_grad


def test_bf16_inputs_are_routed_in_fp32() -> None:
    _, router = make_router()
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(4)).bfloat16()
    routes, exact = router(x), router(x.float())
    assert routes.weights.dtype == routes.scores.dtype == torch.float32
    assert torch.equal(routes.scores, exact.scores)
    assert torch.equal(routes.ids, exact.ids)
