"""Noise of the router: Shazeer's noisy top-k and Switch's jitter, in training only, drawn from torch's generator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import build_config
from moestro.routing.router import JITTER, Noise, Router, Routes

SHAZEER = {"score": "softmax", "normalize": True, "scale": 1.0, "noise": "learned", "bias": "none", "balance": []}
JITTERED = {"score": "softmax", "normalize": False, "scale": 1.0, "noise": "jitter", "bias": "none", "balance": []}


def make_router(settings: dict[str, Any], *, zero: bool = False, **changes: Any) -> Router:
    model = {"hidden_dim": 6, "num_experts": 8, "top_k": 3, "router": settings} | changes
    router = Router(build_config({"model": model}).model)
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        parameter.data.normal_(generator=generator).mul_(0.0 if zero else 1.0)
    return router


def inputs(count: int = 30, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


def route(router: Router, x: Tensor, seed: int) -> Routes:
    routes: Routes = router(x, noise_seed=seed)
    return routes


def keep_top_k(h: list[float], k: int) -> list[float]:
    """Shazeer eq. 5: all but the k largest become −∞."""
    kept = sorted(range(len(h)), key=lambda i: -h[i])[:k]
    return [v if i in kept else -math.inf for i, v in enumerate(h)]


def softmax(values: list[float]) -> list[float]:
    shares = [math.exp(v - max(values)) for v in values]
    return [s / sum(shares) for s in shares]


def test_noisy_gates_equal_shazeers_formula() -> None:
    """G = softmax(KeepTopK(H, k)), H_i = (x W_g)_i + N(0, 1) · softplus((x W_noise)_i) (eq. 3–5)."""
    router, x = make_router(SHAZEER), inputs()
    routes = route(router, x, seed=7)
    normal = Noise(7, router.layer).normal(torch.empty(30, 8)).tolist()
    assert router.weight is not None and router.noise is not None
    for token, row in enumerate(x.tolist()):
        clean = [sum(a * b for a, b in zip(w, row, strict=True)) for w in router.weight.tolist()]
        spread = [math.log1p(math.exp(sum(a * b for a, b in zip(w, row, strict=True)))) for w in router.noise.tolist()]
        h = [c + z * s for c, z, s in zip(clean, normal[token], spread, strict=True)]
        gates = softmax(keep_top_k(h, 3))
        found = [0.0] * 8
        for i, weight in zip(routes.ids[token].tolist(), routes.weights[token].tolist(), strict=True):
            found[i] = weight
        assert found == pytest.approx(gates, rel=1e-4, abs=1e-7)
        assert [i for i in range(8) if found[i] > 0] == [i for i in range(8) if gates[i] > 0]
        assert routes.noisy is not None and routes.noise_std is not None and routes.logits is not None
        assert routes.noisy[token].tolist() == pytest.approx(h, rel=1e-4, abs=1e-5)
        assert routes.noise_std[token].tolist() == pytest.approx(spread, rel=1e-4)
        assert routes.logits[token].tolist() == pytest.approx(clean, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("settings", [SHAZEER, JITTERED], ids=["learned", "jitter"])
def test_noise_follows_the_seed(settings: dict[str, Any]) -> None:
    router, x = make_router(settings), inputs()
    first, again, other = (route(router, x, seed).scores for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("settings", [SHAZEER, JITTERED], ids=["learned", "jitter"])
def test_evaluation_is_without_noise(settings: dict[str, Any]) -> None:
    router, x = make_router(settings).eval(), inputs()
    state = torch.random.get_rng_state()
    routes = router(x)
    assert torch.equal(state, torch.random.get_rng_state())  # nothing was drawn
    assert routes.noisy is None and routes.noise_std is None and router.weight is not None
    torch.testing.assert_close(routes.scores, (x @ router.weight.T).softmax(-1))


def test_both_matrices_of_learned_noise_have_gradients() -> None:
    router = make_router(SHAZEER)
    routes = route(router, inputs(), seed=3)
    (routes.weights * torch.tensor([1.0, -1.0, 0.5])).sum().backward()
    for parameter in (router.weight, router.noise):
        assert parameter is not None and parameter.grad is not None
        assert bool(parameter.grad.isfinite().all()) and float(parameter.grad.abs().max()) > 0


def test_zero_matrices_spread_choices_evenly_with_deviation_ln_2() -> None:
    """Shazeer's appendix A: no imbalance at the start, since softplus(0) = ln 2 is all that is left of H."""
    count, router = 20000, make_router(SHAZEER, zero=True)
    routes = route(router, torch.ones(count, 6), seed=0)
    assert routes.noisy is not None and routes.noise_std is not None
    torch.testing.assert_close(routes.noise_std, torch.full((count, 8), math.log(2)))
    draws = count * 8
    assert routes.noisy.detach().mean().item() == pytest.approx(0.0, abs=5 * math.log(2) / math.sqrt(draws))
    assert routes.noisy.detach().std().item() == pytest.approx(math.log(2), abs=5 * math.log(2) / math.sqrt(2 * draws))
    chance = 3 / 8
    tolerance = 5 * math.sqrt(count * chance * (1 - chance))
    for load in torch.bincount(routes.ids.flatten(), minlength=8).tolist():
        assert load == pytest.approx(count * chance, abs=tolerance)


def test_jitter_multiplies_each_input_of_the_router_by_up_to_one_percent() -> None:
    """With the identity for a matrix the logits are the inputs."""
    router = make_router(JITTERED, hidden_dim=8)
    assert router.weight is not None
    router.weight.data.copy_(torch.eye(8))
    x = 3 * torch.ones(4000, 8)
    routes = route(router, x, seed=0)
    assert routes.logits is not None
    factors = routes.logits.detach().double() / 3
    assert float(factors.min()) >= 1 - JITTER - 1e-6 and float(factors.max()) <= 1 + JITTER + 1e-6
    assert JITTER == 0.01
    spread = JITTER / math.sqrt(3)  # of a uniform distribution on 1 ± JITTER
    assert float(factors.mean()) == pytest.approx(1.0, abs=5 * spread / math.sqrt(factors.numel()))
    assert float(factors.std()) == pytest.approx(spread, rel=0.05)
    assert routes.noisy is None and torch.equal(x, 3 * torch.ones(4000, 8))  # the experts' input is left as it is
