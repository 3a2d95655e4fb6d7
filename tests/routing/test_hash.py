"""Routing by token id: the hash against whole numbers without a word size, its evenness, and what hashed routers do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import build_config
from moestro.errors import ConfigError
from moestro.routing.router import Router
from moestro.routing.selection import hash_experts

CONSTANT = {
    "score": "constant", "selection": "hash", "normalize": False, "scale": 1.0, "bias": "none", "balance": [],
}  # fmt: skip
GOLDEN_TOKENS = (0, 1, 2, 17, 300, 8191, 129279)
GOLDEN_ONE = [37, 60, 30, 50, 6, 19, 8]
GOLDEN_SIX = [
    [2, 15, 20, 24, 36, 44],
    [2, 8, 16, 25, 39, 40],
    [1, 9, 19, 24, 35, 44],
    [6, 8, 21, 30, 32, 41],
    [1, 11, 23, 28, 35, 46],
    [4, 9, 17, 29, 34, 46],
    [3, 9, 16, 27, 37, 47],
]
SHAPES = [(8, 1, 0), (8, 2, 0), (48, 6, 3), (64, 8, 11), (7, 1, 2), (4, 4, 1), (1, 1, 0)]


def signed(value: int) -> int:
    """The number of 64 bits in two's complement that `value` wraps to."""
    return (value + 2**63) % 2**64 - 2**63


def hash_slowly(token: int, layer: int, num_experts: int, top_k: int) -> list[int]:
    """One expert of each of `top_k` ranges: multiply by 2⁶⁴/φ, fold, multiply again, take 31 high bits."""
    size, chosen = num_experts // top_k, []
    for choice in range(top_k):
        mixed = signed((token + (layer * top_k + choice + 1) * 1_000_003) * 0x9E3779B97F4A7C15)
        mixed = signed((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9)
        chosen.append((mixed % 2**64 >> 33) % size + choice * size)
    return chosen


@pytest.mark.parametrize(("num_experts", "top_k", "layer"), SHAPES)
def test_hash_equals_arithmetic_on_whole_numbers(num_experts: int, top_k: int, layer: int) -> None:
    tokens = torch.cat([torch.arange(100), torch.tensor(GOLDEN_TOKENS)])
    ids = hash_experts(tokens, num_experts=num_experts, top_k=top_k, layer=layer)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [hash_slowly(token, layer, num_experts, top_k) for token in tokens.tolist()]


def test_hash_never_changes() -> None:
    """Models trained with it depend on these very numbers."""
    tokens = torch.tensor(GOLDEN_TOKENS)
    assert hash_experts(tokens, num_experts=64, top_k=1, layer=0).flatten().tolist() == GOLDEN_ONE
    assert hash_experts(tokens, num_experts=48, top_k=6, layer=3).tolist() == GOLDEN_SIX


@pytest.mark.parametrize(("num_experts", "top_k", "layer"), SHAPES)
def test_experts_of_a_token_are_distinct_and_in_range(num_experts: int, top_k: int, layer: int) -> None:
    ids = hash_experts(torch.arange(2000), num_experts=num_experts, top_k=top_k, layer=layer).sort(-1).values
    assert bool((ids.diff(dim=-1) > 0).all())
    assert int(ids.min()) >= 0 and int(ids.max()) < num_experts


@pytest.mark.parametrize("stride", [1, 64, 1000])
@pytest.mark.parametrize("layer", [0, 1, 5])
def test_loads_of_many_tokens_are_as_even_as_chance(stride: int, layer: int) -> None:
    """Every load, and every pair of choices, within five standard deviations of a binomial one."""
    count, num_experts, top_k = 8000, 16, 2
    ids = hash_experts(torch.arange(count) * stride, num_experts=num_experts, top_k=top_k, layer=layer)
    pairs = torch.bincount(ids[:, 0] * num_experts + ids[:, 1], minlength=num_experts**2).view(num_experts, -1)[:8, 8:]
    for counts in (torch.bincount(ids.flatten(), minlength=num_experts), pairs.flatten()):
        chance = 1 / 8 if len(counts) == num_experts else 1 / 64
        assert int(counts.sum()) == count * chance * len(counts)
        assert float((counts - count * chance).abs().max()) < 5 * math.sqrt(count * chance * (1 - chance))


def test_layers_choose_independently() -> None:
    count, first, second = 8000, *(
        hash_experts(torch.arange(8000), num_experts=16, top_k=1, layer=layer).flatten() for layer in (0, 1)
    )  # fmt: skip
    joint = torch.bincount(first * 16 + second, minlength=256)
    assert float((joint - count / 256).abs().max()) < 5 * math.sqrt(count / 256 * (1 - 1 / 256))


def make_router(settings: dict[str, Any], layer: int = 0, **changes: Any) -> Router:
    model = {"hidden_dim": 6, "num_experts": 8, "top_k": 2, "num_dense_layers": 0, "router": settings} | changes
    router = Router(build_config({"model": model}).model, layer)
    for parameter in router.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return router


def sample(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 300, (count,), generator=generator)


def test_hash_layers_learn_nothing_and_weigh_all_choices_alike() -> None:
    router = make_router(CONSTANT | {"scale": 3.0})
    assert list(router.parameters()) == []
    x, tokens = sample()
    routes = router(x, tokens)
    assert torch.equal(routes.weights, torch.full((40, 2), 3.0))
    assert torch.equal(routes.ids, router(-2 * x, tokens).ids)
    assert torch.equal(routes.ids[3:9], router(x[3:9], tokens[3:9]).ids)
    assert make_router(CONSTANT | {"normalize": True})(x, tokens).weights.tolist() == [[0.5, 0.5]] * 40


def test_the_gate_of_v4_weighs_what_the_hash_has_chosen() -> None:
    settings = {"score": "sqrt_softplus", "num_hash_layers": 1, "scale": 1.5}
    router, (x, tokens) = make_router(settings), sample()
    routes = router(x, tokens)
    assert router.weight is not None
    for token in range(40):
        chosen = hash_slowly(int(tokens[token]), 0, 8, 2)
        logits = [float((x[token] @ router.weight[i]).detach()) for i in chosen]
        scores = [math.sqrt(math.log1p(math.exp(h))) for h in logits]
        assert routes.ids[token].tolist() == chosen
        assert routes.weights[token].tolist() == pytest.approx([1.5 * s / sum(scores) for s in scores], rel=1e-4)
    routes.weights[:, 0].sum().backward()
    assert router.weight.grad is not None and float(router.weight.grad.abs().max()) > 0


def test_biases_do_not_move_a_hash() -> None:
    router, (x, tokens) = make_router({"selection": "hash"}), sample()
    before = router(x, tokens).ids
    router.bias.copy_(torch.linspace(-5, 5, 8))
    assert torch.equal(before, router(x, tokens).ids)


def test_layers_have_hashes_of_their_own() -> None:
    x, tokens = sample(400)
    first, second = (make_router(CONSTANT, layer)(x, tokens).ids for layer in (0, 1))
    assert 0.1 < float((first == second).float().mean()) < 0.4  # 1/4 by chance


@pytest.mark.parametrize(
    ("changes", "hashed"),
    [
        ({"num_layers": 4}, [True, True, False, False]),
        ({"num_layers": 4, "num_dense_layers": 1}, [None, True, True, False]),
        ({"num_layers": 6, "moe_every": 2}, [True, None, True, None, False, None]),
        ({"num_layers": 1, "mtp_depth": 2}, [True, True, False]),
        ({"num_layers": 3, "num_dense_layers": 3, "mtp_depth": 1}, [None, None, None, True]),
    ],
)
def test_the_first_layers_with_experts_are_hashed(changes: dict[str, Any], hashed: list[bool | None]) -> None:
    model = {"hidden_dim": 6, "num_experts": 8, "top_k": 2, "num_dense_layers": 0} | changes
    config = build_config({"model": model | {"router": {"num_hash_layers": 2}}}).model
    found = [Router(config, index).hashed if config.is_moe(index) else None for index in range(len(hashed))]
    assert found == hashed


def test_hash_routing_needs_token_ids_and_equal_ranges() -> None:
    with pytest.raises(ValueError, match="token ids"):
        make_router(CONSTANT)(sample()[0])
    for settings in (CONSTANT, {"num_hash_layers": 1}):
        with pytest.raises(ConfigError, match="num_experts=8 to be a multiple of top_k=3"):
            make_router(settings, top_k=3)
    with pytest.raises(ConfigError, match="selection='hash'"):
        make_router(CONSTANT | {"selection": "top_k"})
    with pytest.raises(ConfigError, match="balance must be"):
        make_router(CONSTANT | {"balance": [{"kind": "expert", "weight": 0.1}]})
