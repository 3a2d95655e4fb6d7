"""Room of experts and devices against the papers' sequential algorithms, and a random second choice by its chance."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import build_config
from moestro.routing.capacity import find_overflow
from moestro.routing.router import Noise, Router, Routes, spare_sequences

TOP_2 = {"score": "softmax", "normalize": True, "scale": 1.0, "bias": "none", "balance": []}
TOP_1 = TOP_2 | {"normalize": False}


def make_router(settings: dict[str, Any], **changes: Any) -> Router:
    """A router with the identity for a matrix: inputs are logits."""
    model = {"hidden_dim": 8, "num_experts": 8, "top_k": 2, "router": settings} | changes
    router = Router(build_config({"model": model}).model)
    assert router.weight is not None
    router.weight.data.copy_(torch.eye(8))
    return router


def random_choices(num_tokens: int, num_units: int, top_k: int, seed: int) -> Tensor:
    """[N, A], uneven: low units are asked for more often; a unit may be asked twice, as devices are."""
    generator = torch.Generator().manual_seed(seed)
    shares = 1 / torch.arange(1.0, num_units + 1)
    return torch.multinomial(shares, num_tokens * top_k, replacement=True, generator=generator).view(-1, top_k)


def overflow_in_order(units: list[list[int]], wanted: list[list[bool]], room: int) -> list[list[bool]]:
    """GShard algorithm 1: all first choices in the order of the batch, then all second ones; a counter per expert."""
    taken: dict[int, int] = {}
    late = [[False] * len(row) for row in units]
    for choice in range(len(units[0])):
        for token, row in enumerate(units):
            if not wanted[token][choice]:
                continue
            count = taken.get(row[choice], 0)
            late[token][choice] = count >= room
            taken[row[choice]] = count + 1
    return late


def overflow_by_affinity(
    units: list[list[int]], wanted: list[list[bool]], room: int, affinity: list[list[float]], spared: list[bool]
) -> list[list[bool]]:
    """V2 §2.2.4: on every device the choice of the lowest affinity goes, again and again, until the rest has room.

    Of equal ones the later goes first, second choices before first ones; those of spared tokens never go.
    """
    late = [[False] * len(row) for row in units]
    for unit in {u for row in units for u in row}:
        held = [
            (token, choice)
            for token, row in enumerate(units)
            for choice, own in enumerate(row)
            if own == unit and wanted[token][choice]
        ]
        while len(held) > room and any(not spared[token] for token, _ in held):
            free = [(t, c) for t, c in held if not spared[t]]
            token, choice = min(free, key=lambda at: (affinity[at[0]][at[1]], -at[1], -at[0]))
            late[token][choice] = True
            held.remove((token, choice))
    return late


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("room", [0, 1, 4, 9, 1000])
@pytest.mark.parametrize("share_wanted", [0.0, 0.7, 1.0])
def test_order_of_position_equals_the_sequential_algorithm(top_k: int, room: int, share_wanted: float) -> None:
    units = random_choices(30, 5, top_k, seed=top_k)
    wanted = torch.rand(30, top_k, generator=torch.Generator().manual_seed(room)) < share_wanted
    late = find_overflow(units, wanted, room)
    assert late.tolist() == overflow_in_order(units.tolist(), wanted.tolist(), room)
    assert not bool((late & ~wanted).any())


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("room", [0, 2, 7, 1000])
@pytest.mark.parametrize("levels", [0, 1, 3], ids=["distinct", "all equal", "ties"])
@pytest.mark.parametrize("share_spared", [None, 0.0, 0.3, 1.0])
def test_order_of_affinity_drops_the_lowest(top_k: int, room: int, levels: int, share_spared: float | None) -> None:
    generator = torch.Generator().manual_seed(17 * room + top_k)
    units = random_choices(24, 4, top_k, seed=top_k)
    wanted = torch.rand(24, top_k, generator=generator) < 0.8
    affinity = torch.rand(24, top_k, generator=generator)
    if levels:
        affinity = (affinity * levels).floor() / levels
    spared = None if share_spared is None else torch.rand(24, generator=generator) < share_spared
    late = find_overflow(units, wanted, room, affinity=affinity, spared=spared)
    safe = [False] * 24 if spared is None else spared.tolist()
    assert late.tolist() == overflow_by_affinity(units.tolist(), wanted.tolist(), room, affinity.tolist(), safe)


def test_first_choices_come_before_second_ones_of_earlier_tokens() -> None:
    units = torch.tensor([[1, 0], [2, 0], [0, 1]])
    late = find_overflow(units, torch.ones(3, 2, dtype=torch.bool), 1)
    assert late.tolist() == [[False, True], [False, True], [False, True]]


def test_one_expert_that_takes_all_serves_the_first_ones() -> None:
    units = torch.zeros(10, 1, dtype=torch.int64)
    late = find_overflow(units, torch.ones(10, 1, dtype=torch.bool), 4)
    assert late[:, 0].tolist() == [False] * 4 + [True] * 6


def test_spared_tokens_are_served_first_and_take_room_from_the_others() -> None:
    units, wanted = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1, dtype=torch.bool)
    spared = torch.tensor([False, False, False, True, True])
    assert find_overflow(units, wanted, 3, spared=spared)[:, 0].tolist() == [False, True, True, False, False]
    assert find_overflow(units, wanted, 1, spared=spared)[:, 0].tolist() == [True, True, True, False, False]


def logits(num_tokens: int, seed: int = 0) -> Tensor:
    """[N, 8] with a slope: expert 7 is the favourite."""
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(seed)) + torch.arange(8) / 3


def check_limited(routes: Routes, room: int) -> None:
    late = overflow_in_order(routes.ids.tolist(), [[True] * routes.ids.shape[1]] * len(routes.ids), room)
    assert routes.accepted is not None and routes.overflow is not None
    assert routes.accepted.tolist() == [[not value for value in row] for row in late]
    assert int(routes.overflow) == sum(map(sum, late)) > 0


@pytest.mark.parametrize(("settings", "top_k"), [(TOP_1, 1), (TOP_2, 2)], ids=["switch", "gshard"])
def test_the_factor_counts_in_mean_loads_and_evaluation_has_its_own(settings: dict[str, Any], top_k: int) -> None:
    """Switch eq. 3: tokens per batch over experts, times the factor; per choice where there are several."""
    capacity = {"factor": 0.75, "eval_factor": 1.5}
    router = make_router(settings | {"capacity": capacity}, top_k=top_k)
    x = logits(61)
    check_limited(router(x), math.ceil(Fraction(3, 4) * 61 * top_k / 8))
    check_limited(router.eval()(x), math.ceil(Fraction(3, 2) * 61 * top_k / 8))


def test_without_a_factor_nothing_is_limited() -> None:
    training_only = make_router(TOP_2 | {"capacity": {"factor": 1.0}})
    assert training_only(logits(40)).accepted is not None
    routes = training_only.eval()(logits(40))
    assert routes.accepted is None and routes.overflow is None
    evaluation_only = make_router(TOP_2 | {"capacity": {"eval_factor": 1.0}})
    assert evaluation_only(logits(40)).accepted is None
    assert evaluation_only.eval()(logits(40)).accepted is not None


@pytest.mark.parametrize("factor", ["1.0", "1.1", "1.2", "1.25", "2.3"])
@pytest.mark.parametrize("num_tokens", [56, 80, 100, 240, 800])
def test_room_is_the_rounded_up_product_of_exact_numbers(factor: str, num_tokens: int) -> None:
    """1.1 · 800 / 8 is 110, whatever binary fractions make of 1.1."""
    router = make_router(TOP_1 | {"capacity": {"factor": float(factor)}}, top_k=1)
    routes = router(torch.eye(8)[torch.zeros(num_tokens, dtype=torch.int64)] * 5)
    assert routes.accepted is not None
    assert int(routes.accepted.sum()) == math.ceil(Fraction(factor) * num_tokens / 8)


def test_weights_and_scores_do_not_know_of_room() -> None:
    free, limited = make_router(TOP_2), make_router(TOP_2 | {"capacity": {"factor": 0.5}})
    x = logits(40)
    for name in ("ids", "weights", "scores"):
        assert torch.equal(getattr(free(x), name), getattr(limited(x), name))


def test_devices_drop_the_lowest_affinity_and_spare_sequences() -> None:
    """V2: the budget of a device is the mean over devices; tokens of spared sequences are never dropped."""
    capacity = {"factor": 1.0, "unit": "device", "order": "affinity", "spared_fraction": 0.4}
    settings = TOP_1 | {"group_score": "max", "capacity": capacity}
    router = make_router(settings, top_k=3, num_groups=4, top_k_groups=2)
    x, starts = logits(50), torch.tensor([0, 9, 21, 22, 35, 50])
    seen: set[bool] = set()
    for seed in range(6):
        routes = router(x, None, starts, noise_seed=seed)
        spared = spare_sequences(50, starts, Noise(seed, router.layer).uniform(starts[1:]) < 0.4)
        assert routes.accepted is not None and routes.overflow is not None
        devices = [[i // 2 for i in row] for row in routes.ids.tolist()]
        assert all(len(set(row)) <= 2 for row in devices)
        room = math.ceil(Fraction(50 * 3, 4))
        late = overflow_by_affinity(devices, [[True] * 3] * 50, room, routes.weights.tolist(), spared.tolist())
        assert routes.accepted.logical_not().tolist() == late
        assert int(routes.overflow) == sum(map(sum, late))
        assert bool(routes.accepted[spared].all())
        seen |= {bool(spared.any()), bool(spared.all())}
    assert seen == {True, False}
    assert router.eval()(x, None, starts).accepted is None


def test_sequences_are_spared_whole_and_by_chance() -> None:
    starts = torch.arange(0, 12001, 3)
    spared = spare_sequences(12000, starts, Noise(0, 0).uniform(starts[1:]) < 0.1)
    rows = spared.view(4000, 3)
    assert torch.equal(rows.any(-1), rows.all(-1))
    assert int(rows[:, 0].sum()) == pytest.approx(400, abs=5 * math.sqrt(4000 * 0.1 * 0.9))
    some = spare_sequences(12, torch.tensor([0, 5, 5, 12]), torch.tensor([True, True, False]))
    assert some.tolist() == [True] * 5 + [False] * 7


@pytest.mark.parametrize("weight", [0.02, 0.1, 0.3, 0.45, 0.5])
def test_a_second_choice_is_followed_with_twice_its_weight(weight: float) -> None:
    """GShard: dispatched where 2 g₂ exceeds a uniform number; g₁ + g₂ = 1."""
    count, router = 20000, make_router(TOP_2 | {"random_second": True, "scale": 7.0})
    row = torch.full((8,), -50.0)
    row[2], row[5] = math.log(1 - weight), math.log(weight)
    routes = router(row.expand(count, 8))
    assert routes.accepted is not None and routes.overflow is not None
    assert bool(routes.accepted[:, 0].all()) and int(routes.overflow) == 0
    chance = 2 * weight
    sd = math.sqrt(count * chance * max(1 - chance, 1e-4))
    assert int(routes.accepted[:, 1].sum()) == pytest.approx(count * chance, abs=5 * sd)


def test_a_first_choice_is_always_followed_and_every_later_one_by_its_weight() -> None:
    count, shares = 20000, (0.4, 0.35, 0.25)
    router = make_router(TOP_2 | {"random_second": True}, top_k=3)
    row = torch.full((8,), -50.0)
    row[:3] = torch.tensor(shares).log()
    accepted = router(row.expand(count, 8), noise_seed=1).accepted
    assert accepted[:, 0].sum().item() == count
    for choice in (1, 2):
        chance = 2 * shares[choice]
        tolerance = 5 * math.sqrt(count * chance * (1 - chance))
        assert accepted[:, choice].sum().item() == pytest.approx(count * chance, abs=tolerance)


def test_random_choices_follow_the_seed_in_training_only() -> None:
    router, x = make_router(TOP_2 | {"random_second": True}), logits(200)

    def accepted(seed: int) -> Tensor:
        routes = router(x, noise_seed=seed)
        assert routes.accepted is not None
        return routes.accepted

    assert torch.equal(accepted(1), accepted(1)) and not torch.equal(accepted(1), accepted(2))
    assert router.eval()(x).accepted is None


def test_choices_that_are_not_followed_take_no_room_and_are_no_overflow() -> None:
    settings = TOP_2 | {"random_second": True}
    x = logits(64)
    wanted = make_router(settings)(x, noise_seed=4).accepted
    routes = make_router(settings | {"capacity": {"factor": 1.0}})(x, noise_seed=4)
    assert wanted is not None and routes.accepted is not None and routes.overflow is not None
    late = overflow_in_order(routes.ids.tolist(), wanted.tolist(), 16)
    assert routes.accepted.tolist() == (wanted & ~torch.tensor(late)).tolist()
    assert int(routes.overflow) == sum(map(sum, late)) < int((~routes.accepted).sum())
