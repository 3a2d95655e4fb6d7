"""The router against a transcription of the papers in loops over Python numbers; ties by what any rule must hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import ModelConfig, build_config
from moestro.routing.router import Router
from moestro.routing.selection import score_experts

SCORES = ("sigmoid", "softmax", "sqrt_softplus")


def make_router(**changes: Any) -> tuple[ModelConfig, Router, Tensor]:
    """(config, router, its matrix [E, D]) with 16 experts in 4 groups and random biases, most of them negative."""
    shape = {"hidden_dim": 12, "num_experts": 16, "top_k": 4, "num_groups": 4, "top_k_groups": 2}
    config = build_config({"model": shape | changes}).model
    router = Router(config)
    assert router.weight is not None
    generator = torch.Generator().manual_seed(1)
    router.weight.data.normal_(generator=generator)
    router.bias.copy_(torch.randn(config.num_experts, generator=generator) * 0.4 - 1.0)
    return config, router, router.weight


def read_logits(score: str, num_experts: int, **changes: Any) -> Router:
    """A router without groups whose inputs are its logits."""
    changes = {"num_groups": 1, "top_k_groups": 1, "hidden_dim": num_experts, "num_experts": num_experts} | changes
    _, router, weight = make_router(router={"score": score}, **changes)
    weight.data.copy_(torch.eye(num_experts))
    router.bias.zero_()
    return router


def best(numbers: list[float], count: int) -> list[int]:
    return sorted(range(len(numbers)), key=lambda i: -numbers[i])[:count]


def score_slowly(logits: list[float], score: str) -> list[float]:
    if score == "sigmoid":
        return [1 / (1 + math.exp(-a)) for a in logits]
    if score == "sqrt_softplus":
        return [math.sqrt(math.log(1 + math.exp(a))) for a in logits]
    total = sum(math.exp(a) for a in logits)
    return [math.exp(a) / total for a in logits]


def route_slowly(config: ModelConfig, x: list[float], weight: list[list[float]], bias: list[float]) -> dict[int, float]:
    """Expert -> weight of one token: V3 eq. 12–16 with node-limited routing; V2 with the group maximum; V4's score."""
    scores = score_slowly([sum(a * b for a, b in zip(row, x, strict=True)) for row in weight], config.router.score)
    if config.router.bias == "multiplicative":
        biased = [s * (1 + b) for s, b in zip(scores, bias, strict=True)]
    else:
        biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // config.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
    counted = 2 if config.router.group_score == "top2" else 1
    group_scores = [sum(sorted((biased[i] for i in g), reverse=True)[:counted]) for g in groups]
    reachable = [i for g in best(group_scores, config.top_k_groups) for i in groups[g]]
    chosen = sorted(reachable, key=lambda i: -biased[i])[: config.top_k]
    divisor = sum(scores[i] for i in chosen) if config.router.normalize else 1.0
    return {i: scores[i] / divisor * config.router.scale for i in chosen}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bias", ["sign", "multiplicative"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("groups", "kept", "group_score"),
    [(1, 1, "top2"), (4, 2, "top2"), (4, 1, "top2"), (4, 4, "top2"), (8, 3, "max"), (16, 5, "max")],
)
def test_routes_equal_the_papers(
    score: str, bias: str, normalize: bool, groups: int, kept: int, group_score: str
) -> None:
    settings = {"score": score, "bias": bias, "normalize": normalize, "group_score": group_score, "scale": 1.5}
    config, router, weight = make_router(num_groups=groups, top_k_groups=kept, router=settings)
    x = torch.randn(25, 12, generator=torch.Generator().manual_seed(2))
    routes = router(x)
    for token in range(len(x)):
        slow = route_slowly(config, x[token].tolist(), weight.tolist(), router.bias.tolist())
        ids = routes.ids[token].tolist()
        assert ids == list(slow)  # the best first
        assert routes.weights[token].tolist() == pytest.approx([slow[i] for i in ids], rel=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_all_experts_may_be_active_and_one_may_be_all(score: str) -> None:
    config, router, _ = make_router(num_groups=1, top_k_groups=1, top_k=16, router={"score": score})
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(3))
    routes = router(x)
    assert routes.ids.sort(-1).values.tolist() == [list(range(16))] * 9
    divided = routes.scores / routes.scores.sum(-1, keepdim=True) * config.router.scale
    torch.testing.assert_close(routes.weights, divided.gather(1, routes.ids))

    _, alone, _ = make_router(num_groups=1, top_k_groups=1, top_k=1, num_experts=1, router={"score": score})
    routes = alone(x)
    assert routes.ids.tolist() == [[0]] * 9
    torch.testing.assert_close(routes.weights, torch.full((9, 1), 2.5))


def test_weights_are_positive_and_sum_to_the_scale_whatever_the_bias() -> None:
    _, router, _ = make_router()
    routes = router(torch.randn(20, 12, generator=torch.Generator().manual_seed(3)))
    assert bool((routes.weights > 0).all())
    torch.testing.assert_close(routes.weights.sum(-1), torch.full((20,), 2.5))
    assert not router.bias.requires_grad


def test_bias_decides_who_is_chosen_but_not_the_score() -> None:
    _, router, _ = make_router(num_groups=1, top_k_groups=1)
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(5))
    before = router(x)
    router.bias[3] = 10.0
    after = router(x)
    assert torch.equal(before.scores, after.scores)
    assert after.ids[:, 0].tolist() == [3] * 20 and before.ids[:, 0].tolist() != [3] * 20


@pytest.mark.parametrize("score", SCORES)
def test_scores_equal_their_formulas(score: str) -> None:
    logits = torch.linspace(-9, 9, 40).reshape(8, 5)
    slow = [score_slowly(row, score) for row in logits.tolist()]
    torch.testing.assert_close(score_experts(logits, score), torch.tensor(slow), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [50.0, 90.0, 200.0, 1e4])
def test_huge_and_small_logits_keep_weights_and_gradients_finite(score: str, size: float) -> None:
    router = read_logits(score, 4, top_k=2)
    logits = size * torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, 0, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1]])
    x = logits.requires_grad_()
    routes = router(x)
    assert bool(routes.weights.isfinite().all()) and bool((routes.weights >= 0).all())
    torch.testing.assert_close(routes.weights[:3].sum(-1), torch.full((3,), 2.5))
    routes.weights.square().sum().backward()
    assert router.weight is not None and router.weight.grad is not None and x.grad is not None
    assert bool(x.grad.isfinite().all()) and bool(router.weight.grad.isfinite().all())


def test_gradient_of_the_weights_equals_differences_of_the_formula() -> None:
    """Normalised weights of the chosen: the rest has no gradient, nor has the bias."""
    router = read_logits("sqrt_softplus", 4, top_k=2)
    x = torch.tensor([[0.3, -0.2, 0.9, 0.1]], requires_grad=True)
    routes = router(x)
    routes.weights[0, 0].backward()
    assert routes.ids.tolist() == [[2, 0]] and x.grad is not None

    def first_weight(logits: list[float]) -> float:
        scores = score_slowly(logits, "sqrt_softplus")
        return 2.5 * scores[2] / (scores[2] + scores[0])

    logits = x.tolist()[0]
    for i, step in enumerate(1e-5 * torch.eye(4, dtype=torch.float64)):
        up, down = ([a + sign * float(d) for a, d in zip(logits, step, strict=True)] for sign in (1, -1))
        assert float(x.grad[0, i]) == pytest.approx((first_weight(up) - first_weight(down)) / 2e-5, abs=1e-5)


def test_bf16_inputs_are_routed_in_fp32() -> None:
    _, router, _ = make_router()
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(4)).bfloat16()
    routes, exact = router(x), router(x.float())
    assert routes.weights.dtype == routes.scores.dtype == torch.float32
    assert torch.equal(routes.scores, exact.scores)
    assert torch.equal(routes.ids, exact.ids)
