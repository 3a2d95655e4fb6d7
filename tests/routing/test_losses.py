"""Every auxiliary loss against its formula in loops over Python numbers; its gradient against their differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import BalanceTerm, ModelConfig, build_config
from moestro.routing.balance import balance_loss, load_loss, squared_variation
from moestro.routing.router import Routes
from moestro.routing.selection import score_experts

Matrix = list[list[float]]
Choices = list[list[int]]

EXPERTS, TOP_K, GROUPS, REACHED = 6, 2, 3, 2
SEQUENCES, LENGTH = 3, 5
TOKENS = SEQUENCES * LENGTH
VALID = {"all": 1.1, "some": 0.6, "none": 0.0}


def make_config(top_k: int = TOP_K) -> ModelConfig:
    """All groups in reach where two of the three do not have enough experts."""
    reached = REACHED if top_k <= REACHED * EXPERTS // GROUPS else GROUPS
    shape = {"num_experts": EXPERTS, "top_k": top_k, "num_groups": GROUPS, "top_k_groups": reached}
    return build_config({"model": shape}).model


def make_routes(score: str, top_k: int = TOP_K, seed: int = 0) -> Routes:
    """Routes in double precision, chosen by noisy logits plus a bias, so that they are not the best by score."""
    generator = torch.Generator().manual_seed(seed)
    logits, normal, spread, bias = (torch.randn(TOKENS, EXPERTS, generator=generator).double() for _ in range(4))
    std = (0.5 * spread).exp()
    noisy = logits + normal * std
    scores = score_experts(logits, score)
    ids = (scores + 0.3 * bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return Routes(ids, weights / weights.sum(-1, keepdim=True), scores, logits, noisy=noisy, noise_std=std)


def make_valid(share: str) -> Tensor:
    """[N] bool; under "some" one sequence has no token at all."""
    valid = torch.rand(TOKENS, generator=torch.Generator().manual_seed(9)) < VALID[share]
    if share == "some":
        valid[LENGTH : 2 * LENGTH] = False
    return valid


def loss_of(term: BalanceTerm, routes: Routes, valid: Tensor, top_k: int = TOP_K) -> Tensor:
    return balance_loss(term, routes, make_config(top_k), valid, SEQUENCES)


def score_slowly(logits: list[float], score: str) -> list[float]:
    if score == "sigmoid":
        return [1 / (1 + math.exp(-a)) for a in logits]
    if score == "sqrt_softplus":
        return [math.sqrt(math.log1p(math.exp(a))) for a in logits]
    total = sum(math.exp(a) for a in logits)
    return [math.exp(a) / total for a in logits]


def parts_of(valid: list[bool], over: str) -> list[list[int]]:
    """Valid tokens of every sequence, or of the batch."""
    size = LENGTH if over == "sequence" else TOKENS
    return [[t for t in range(start, start + size) if valid[t]] for start in range(0, TOKENS, size)]


def mean_probability(scores: Matrix, part: list[int], expert: int) -> float:
    return sum(scores[t][expert] / sum(scores[t]) for t in part) / max(len(part), 1)


def expert_slowly(scores: Matrix, ids: Choices, part: list[int]) -> float:
    """N Σ f P of Switch eq. 4–6 for one choice; Σ f P with f = N'/(K' T) Σ 1 of DeepSeekMoE eq. 12–14 for several."""
    total = 0.0
    for i in range(EXPERTS):
        chosen = sum(i in ids[t] for t in part)
        total += EXPERTS / (len(ids[0]) * max(len(part), 1)) * chosen * mean_probability(scores, part, i)
    return total


def sequence_slowly(scores: Matrix, ids: Choices, part: list[int]) -> float:
    """V3 eq. 17–20: the same with the best by unbiased score in place of the chosen."""
    best = [sorted(range(EXPERTS), key=lambda i: -row[i])[: len(ids[0])] for row in scores]
    return expert_slowly(scores, best, part)


def device_slowly(scores: Matrix, ids: Choices, part: list[int]) -> float:
    """DeepSeekMoE eq. 15–17: f' is the mean of f over a device's experts, P' the sum of P."""
    size, total = EXPERTS // GROUPS, 0.0
    for device in range(GROUPS):
        own = range(device * size, (device + 1) * size)
        f = [EXPERTS / (len(ids[0]) * max(len(part), 1)) * sum(i in ids[t] for t in part) for i in own]
        total += sum(f) / size * sum(mean_probability(scores, part, i) for i in own)
    return total


def communication_slowly(scores: Matrix, ids: Choices, part: list[int]) -> float:
    """V2 eq. 29–31: f'' = D/(M T) Σ 1(token t is sent to the device), once however many of its experts it uses."""
    size, total = EXPERTS // GROUPS, 0.0
    for device in range(GROUPS):
        own = range(device * size, (device + 1) * size)
        sent = sum(any(i in own for i in ids[t]) for t in part)
        p = sum(mean_probability(scores, part, i) for i in own)
        total += GROUPS / (REACHED * max(len(part), 1)) * sent * p
    return total


def first_choice_slowly(scores: Matrix, ids: Choices, part: list[int]) -> float:
    """E² times GShard's mean over experts of (c_e / S) · m_e, m_e the mean gate."""
    terms = []
    for i in range(EXPERTS):
        first = sum(ids[t][0] == i for t in part)
        terms.append(first / max(len(part), 1) * mean_probability(scores, part, i))
    return EXPERTS**2 * sum(terms) / EXPERTS


SHARES: dict[str, Callable[[Matrix, Choices, list[int]], float]] = {
    "expert": expert_slowly,
    "sequence": sequence_slowly,
    "device": device_slowly,
    "communication": communication_slowly,
    "first_choice": first_choice_slowly,
}
SHARE_TERMS = [
    ("expert", "batch"), ("expert", "sequence"), ("sequence", "sequence"), ("device", "batch"),
    ("device", "sequence"), ("communication", "batch"), ("communication", "sequence"), ("first_choice", "batch"),
]  # fmt: skip


def variation_slowly(values: list[float]) -> float:
    """CV²: the population's variance over the squared mean."""
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2 if mean else 0.0


def importance_slowly(weights: Matrix, ids: Choices, part: list[int]) -> float:
    """Shazeer eq. 6–7: CV² of the sums over tokens of the gates G(x)."""
    gates = [[dict(zip(ids[t], weights[t], strict=True)).get(i, 0.0) for i in range(EXPERTS)] for t in part]
    return variation_slowly([sum(row[i] for row in gates) for i in range(EXPERTS)])


def load_slowly(logits: Matrix, noisy: Matrix, std: Matrix, top_k: int, part: list[int]) -> float:
    """Shazeer eq. 8–11: P(x, i) = Φ((h_i − kth_excluding(H, k, i)) / std_i), the k-th largest but for i's own."""
    loads = [0.0] * EXPERTS
    for t in part:
        for i in range(EXPERTS):
            others = sorted((noisy[t][j] for j in range(EXPERTS) if j != i), reverse=True)
            z = (logits[t][i] - others[top_k - 1]) / std[t][i]
            loads[i] += (1 + math.erf(z / math.sqrt(2))) / 2
    return variation_slowly(loads)


def z_slowly(logits: Matrix, part: list[int]) -> float:
    """ST-MoE eq. 5, summed: (log Σ_j exp x_j)² of every token."""
    return sum(math.log(sum(math.exp(a) for a in logits[t])) ** 2 for t in part)


def check_gradient(fast: Callable[[Tensor], Tensor], slow: Callable[[Matrix], float], at: Tensor) -> None:
    """The gradient of `fast` at a matrix of doubles against central differences of `slow`."""
    leaf = at.detach().clone().requires_grad_()
    fast(leaf).backward()
    assert leaf.grad is not None
    matrix, step = at.tolist(), 1e-6
    for row in range(at.shape[0]):
        for column in range(at.shape[1]):
            value = matrix[row][column]
            ends = []
            for moved in (value + step, value - step):
                matrix[row][column] = moved
                ends.append(slow(matrix))
            matrix[row][column] = value
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(leaf.grad[row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-7), (row, column)


@pytest.mark.parametrize(("kind", "over"), SHARE_TERMS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("share", VALID)
def test_losses_of_shares_equal_loops(kind: Any, over: Any, score: str, share: str) -> None:
    routes, valid = make_routes(score), make_valid(share)
    term, ids = BalanceTerm(kind=kind, weight=1.0, over=over), routes.ids.tolist()
    assert routes.logits is not None

    def slow(logits: Matrix) -> float:
        scores = [score_slowly(row, score) for row in logits]
        return sum(SHARES[kind](scores, ids, part) for part in parts_of(valid.tolist(), over))

    def fast(logits: Tensor) -> Tensor:
        return loss_of(term, replace(routes, scores=score_experts(logits, score)), valid)

    assert float(fast(routes.logits)) == pytest.approx(slow(routes.logits.tolist()), rel=1e-9, abs=1e-12)
    check_gradient(fast, slow, routes.logits)


@pytest.mark.parametrize("share", VALID)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_importance_equals_loops(share: str, top_k: int) -> None:
    routes, valid = make_routes("softmax", top_k), make_valid(share)
    term, part = BalanceTerm(kind="importance", weight=1.0), parts_of(valid.tolist(), "batch")[0]

    def slow(weights: Matrix) -> float:
        return importance_slowly(weights, routes.ids.tolist(), part)

    loss = loss_of(term, routes, valid, top_k)
    assert float(loss) == pytest.approx(slow(routes.weights.tolist()), rel=1e-9, abs=1e-12)
    check_gradient(lambda w: loss_of(term, replace(routes, weights=w), valid, top_k), slow, routes.weights)


@pytest.mark.parametrize("share", VALID)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_load_equals_loops(share: str, top_k: int) -> None:
    """Gradients by all three: logits, noisy logits (which set the threshold) and the deviation of the noise."""
    routes, valid = make_routes("softmax", top_k), make_valid(share)
    assert routes.logits is not None and routes.noisy is not None and routes.noise_std is not None
    term, part = BalanceTerm(kind="load", weight=1.0), parts_of(valid.tolist(), "batch")[0]
    h, noisy, std = routes.logits, routes.noisy, routes.noise_std
    lists: tuple[Matrix, Matrix, Matrix] = h.tolist(), noisy.tolist(), std.tolist()
    loss = loss_of(term, routes, valid, top_k)
    assert float(loss) == pytest.approx(load_slowly(*lists, top_k, part), rel=1e-9, abs=1e-12)
    check_gradient(
        lambda m: loss_of(term, replace(routes, logits=m), valid, top_k),
        lambda m: load_slowly(m, lists[1], lists[2], top_k, part),
        h,
    )
    check_gradient(
        lambda m: loss_of(term, replace(routes, noisy=m), valid, top_k),
        lambda m: load_slowly(lists[0], m, lists[2], top_k, part),
        noisy,
    )
    check_gradient(
        lambda m: loss_of(term, replace(routes, noise_std=m), valid, top_k),
        lambda m: load_slowly(lists[0], lists[1], m, top_k, part),
        std,
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_does_not_depend_on_how_equal_logits_are_ordered(top_k: int) -> None:
    noisy = torch.randint(0, 3, (TOKENS, EXPERTS), generator=torch.Generator().manual_seed(4)).double()
    routes = replace(make_routes("softmax"), noisy=noisy)
    assert routes.logits is not None and routes.noise_std is not None
    lists: tuple[Matrix, Matrix, Matrix] = routes.logits.tolist(), noisy.tolist(), routes.noise_std.tolist()
    loss = load_loss(routes.logits, noisy, routes.noise_std, top_k=top_k)
    assert float(loss) == pytest.approx(load_slowly(*lists, top_k, list(range(TOKENS))), rel=1e-9)


def test_smooth_load_is_the_chance_of_being_chosen_if_the_noise_of_one_were_drawn_again() -> None:
    """What eq. 8 says in words, by drawing: the loss of one token is CV² of the six chances."""
    generator, draws = torch.Generator().manual_seed(5), 40000
    h, normal, spread = (torch.randn(EXPERTS, generator=generator).double() for _ in range(3))
    std = spread.exp()
    noisy = h + normal * std
    chances = []
    for i in range(EXPERTS):
        again = noisy.expand(draws, -1).clone()
        again[:, i] = h[i] + std[i] * torch.randn(draws, generator=generator).double()
        chances.append((again.topk(TOP_K).indices == i).any(-1).double().mean())
    loss = load_loss(h[None], noisy[None], std[None], top_k=TOP_K)
    assert float(loss) == pytest.approx(float(squared_variation(torch.stack(chances))), rel=0.05)


def test_load_is_silent_where_there_is_no_noise() -> None:
    term, routes = BalanceTerm(kind="load", weight=1.0), replace(make_routes("softmax"), noisy=None, noise_std=None)
    assert float(loss_of(term, routes, make_valid("all"))) == 0.0


@pytest.mark.parametrize("share", VALID)
def test_z_equals_loops(share: str) -> None:
    routes, valid = make_routes("softmax"), make_valid(share)
    term, part = BalanceTerm(kind="z", weight=1.0), parts_of(valid.tolist(), "batch")[0]
    assert routes.logits is not None
    loss = loss_of(term, routes, valid)
    assert float(loss) == pytest.approx(z_slowly(routes.logits.tolist(), part), rel=1e-9, abs=1e-12)
    check_gradient(
        lambda m: loss_of(term, replace(routes, logits=m), valid), lambda m: z_slowly(m, part), routes.logits
    )


def uniform_routes(top_k: int) -> Routes:
    """Equal scores, and every expert chosen equally often, first and otherwise."""
    ids = torch.stack([(torch.arange(top_k) * 2 + t) % EXPERTS for t in range(2 * EXPERTS)])
    scores = torch.full((2 * EXPERTS, EXPERTS), 1 / EXPERTS)
    return Routes(ids, torch.full(ids.shape, 1 / top_k), scores, torch.zeros_like(scores))


@pytest.mark.parametrize("kind", ["expert", "device", "first_choice"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_perfect_balance_costs_one_and_one_expert_for_all_costs_all_experts(kind: Any, top_k: int) -> None:
    term, config = BalanceTerm(kind=kind, weight=1.0), make_config(top_k)
    routes, valid = uniform_routes(top_k), torch.ones(2 * EXPERTS, dtype=torch.bool)
    assert float(balance_loss(term, routes, config, valid, 1)) == pytest.approx(1.0)
    scores = torch.tensor([1.0] + [0.0] * (EXPERTS - 1)).expand(2 * EXPERTS, -1)
    alone = replace(routes, ids=torch.zeros(2 * EXPERTS, 1, dtype=torch.int64), scores=scores)
    worst = GROUPS if kind == "device" else EXPERTS
    assert float(balance_loss(term, alone, make_config(1), valid, 1)) == pytest.approx(worst)


@pytest.mark.parametrize("kind", ["importance", "load"])
def test_variation_is_zero_in_perfect_balance_and_experts_less_one_for_one_alone(kind: Any) -> None:
    term, valid = BalanceTerm(kind=kind, weight=1.0), torch.ones(2 * EXPERTS, dtype=torch.bool)
    routes = replace(uniform_routes(1), noisy=torch.zeros(2 * EXPERTS, EXPERTS), noise_std=torch.ones(12, EXPERTS))
    assert float(balance_loss(term, routes, make_config(1), valid, 1)) == pytest.approx(0.0, abs=1e-9)
    sure = torch.tensor([1e4] + [0.0] * (EXPERTS - 1)).expand(12, -1)
    alone = replace(routes, ids=torch.zeros(12, 1, dtype=torch.int64), logits=sure - 5e3, noisy=sure)
    assert float(balance_loss(term, alone, make_config(1), valid, 1)) == pytest.approx(EXPERTS - 1)


@pytest.mark.parametrize("kind", ["sequence", "expert"])
def test_loss_is_constant_where_every_expert_is_always_chosen(kind: Any) -> None:
    routes = make_routes("sigmoid", EXPERTS)
    term = BalanceTerm(kind=kind, weight=1.0)
    loss = loss_of(term, routes, make_valid("all"), EXPERTS)
    assert float(loss) == pytest.approx(SEQUENCES if kind == "sequence" else 1)


@pytest.mark.parametrize("kind", ["sequence", "expert", "device", "communication", "first_choice", "importance"])
def test_one_expert_alone_has_the_loss_of_balance(kind: Any) -> None:
    config = build_config({"model": {"num_experts": 1, "top_k": 1}}).model
    scores, ids = torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int64)
    routes = Routes(ids, torch.ones(8, 1), scores, scores)
    term = BalanceTerm(kind=kind, weight=1.0)
    loss = balance_loss(term, routes, config, torch.ones(8, dtype=torch.bool), 2)
    assert float(loss) == pytest.approx({"sequence": 2.0, "importance": 0.0}.get(kind, 1.0), abs=1e-9)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("kind", ["sequence", "expert", "device", "communication", "first_choice", "z"])
@pytest.mark.parametrize("size", [60.0, 200.0, 1e4])
def test_huge_and_small_logits_keep_loss_and_gradient_finite(score: str, kind: Any, size: float) -> None:
    """Tokens that all experts refuse, whose scores are zero in fp32, included."""
    signs = torch.tensor([[1.0] * 6, [-1.0] * 6, [1.0] + [-1.0] * 5, [0.0] + [-1.0] * 5]).repeat(3, 1)
    logits = (size * signs).requires_grad_()
    scores = score_experts(logits, score)
    routes = Routes(scores.topk(TOP_K).indices, scores[:, :TOP_K], scores, logits)
    loss = balance_loss(BalanceTerm(kind=kind, weight=1.0), routes, make_config(), torch.ones(12) > 0, 3)
    loss.backward()
    assert math.isfinite(loss.item()) and logits.grad is not None
    assert bool(logits.grad.isfinite().all())
