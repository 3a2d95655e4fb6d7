"""The fused operations against their specification, forward and backward, at awkward sizes."""

import math

import pytest
import torch
from by_form import by_torch
from torch import Tensor

from moestro.ops.training import reference


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def same_gradients(function_name: str, inputs: list[Tensor], *args: object, rtol: float = 1e-9) -> None:
    results = []
    for module in (reference, by_torch):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = getattr(module, function_name)(*leaves, *args)
        out = out[0] if isinstance(out, tuple) else out
        probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        (out * probe + out).sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("n", "experts", "top_k"), [(1, 4, 2), (7, 5, 3), (64, 8, 1), (129, 3, 3)])
def test_grouped_experts_agree(n: int, experts: int, top_k: int) -> None:
    ids = torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(i))[:top_k] for i in range(n)])
    x, gate_up, down = leaf(n, 6), leaf(experts, 10, 6, seed=1), leaf(experts, 6, 5, seed=2)
    weights = leaf(n, top_k, seed=3)
    results = []
    for module in (reference, by_torch):
        leaves = [t.detach().clone().requires_grad_() for t in (x, gate_up, down, weights)]
        out = module.grouped_experts(*leaves[:3], ids, leaves[3])
        (out * torch.arange(6.0)).sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_grouped_experts_take_all_tokens_on_one_expert() -> None:
    ids = torch.full((40, 1), 2)
    x, gate_up, down, weights = leaf(40, 4), leaf(6, 6, 4, seed=1), leaf(6, 4, 3, seed=2), leaf(40, 1, seed=3)
    out = by_torch.grouped_experts(x, gate_up, down, ids, weights)
    torch.testing.assert_close(out, reference.grouped_experts(x, gate_up, down, ids, weights))
    out.sum().backward()
    assert gate_up.grad is not None
    assert gate_up.grad[[0, 1, 3, 4, 5]].abs().max() == 0
    assert gate_up.grad[2].abs().max() > 0


def experts_slowly(
    x: list[list[float]], gate_up: Tensor, down: Tensor, ids: list[list[int]], weights: list[list[float]]
) -> list[list[float]]:
    """V3 eq. 12 in loops: Σ weight · down (silu(gate x) ⊙ up x); id E adds nothing."""
    matrices, downs = gate_up.tolist(), down.tolist()
    out = [[0.0] * len(row) for row in x]
    for token, row in enumerate(x):
        carried_out = [(e, w) for e, w in zip(ids[token], weights[token], strict=True) if e < len(matrices)]
        for expert, weight in carried_out:
            h = [sum(a * b for a, b in zip(line, row, strict=True)) for line in matrices[expert]]
            half = len(h) // 2
            act = [g / (1 + math.exp(-g)) * u for g, u in zip(h[:half], h[half:], strict=True)]
            for i, line in enumerate(downs[expert]):
                out[token][i] += weight * sum(a * b for a, b in zip(line, act, strict=True))
    return out


def with_rejected(ids: Tensor, experts: int, share: float) -> Tensor:
    """Some choices replaced by id E."""
    rejected = torch.rand(ids.shape, generator=torch.Generator().manual_seed(8)) < share
    return ids.masked_fill(rejected, experts)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("n", "experts", "top_k"), [(1, 4, 2), (23, 5, 3), (40, 1, 1), (30, 3, 3)])
def test_choices_of_id_e_add_exactly_nothing(n: int, experts: int, top_k: int, share: float) -> None:
    """Output and all gradients: as if those choices were not there."""
    chosen = torch.stack([(torch.arange(top_k) + i * i) % experts for i in range(n)])
    ids = with_rejected(chosen, experts, share)
    inputs = [leaf(n, 6), leaf(experts, 10, 6, seed=1), leaf(experts, 6, 5, seed=2), leaf(n, top_k, seed=3)]
    slow = experts_slowly(inputs[0].tolist(), inputs[1], inputs[2], ids.tolist(), inputs[3].tolist())
    results = []
    for module in (reference, by_torch):
        x, gate_up, down, weights = (t.detach().clone().requires_grad_() for t in inputs)
        out = module.grouped_experts(x, gate_up, down, ids, weights)
        torch.testing.assert_close(out, torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        (out * torch.arange(1.0, 7.0)).sum().backward()
        grads = [t.grad for t in (x, gate_up, down, weights)]
        dx, d_gate_up, d_down, d_weights = (torch.zeros(0) if g is None else g for g in grads)
        rejected, idle = ids == experts, torch.bincount(ids.flatten(), minlength=experts)[:experts] == 0
        for nothing in (out[rejected.all(-1)], dx[rejected.all(-1)], d_weights[rejected]):
            assert not bool(nothing.any())
        for nothing in (d_gate_up[idle], d_down[idle]):
            assert not bool(nothing.any())
        assert share == 1.0 or bool((d_weights != 0).eq(~rejected).all())
        results.append([out.detach(), dx, d_gate_up, d_down, d_weights])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_rejected_choices_hide_even_weights_and_inputs_that_are_not_finite() -> None:
    """What is not carried out is not multiplied by zero: it is not computed."""
    x, gate_up, down = leaf(4, 6), leaf(3, 10, 6, seed=1), leaf(3, 6, 5, seed=2)
    weights, ids = leaf(4, 2, seed=3), torch.tensor([[0, 3], [1, 2], [3, 3], [2, 0]])
    with torch.no_grad():
        weights[0, 1], x[2], gate_up[1] = float("nan"), float("inf"), float("nan")
    for module in (reference, by_torch):
        out = module.grouped_experts(x, gate_up, down, ids, weights)
        assert out.isfinite().all(-1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("starts", [[0, 1], [0, 1, 2, 5], [0, 127, 255, 384], [0, 300], [0, 128, 257]])
@pytest.mark.parametrize("v_dim", [3, 8])
def test_packed_attention_agrees(starts: list[int], v_dim: int) -> None:
    n = starts[-1]
    q, k, v = leaf(n, 2, 5), leaf(n, 2, 5, seed=1), leaf(n, 2, v_dim, seed=2)
    # the specification takes its softmax in fp32
    same_gradients("packed_attention", [q, k, v], torch.tensor(starts), 0.3, rtol=2e-6)


@pytest.mark.parametrize("n", [1, 5, 1024, 1500])
def test_linear_cross_entropy_agrees(n: int) -> None:
    hidden, weight = leaf(n, 6), leaf(11, 6, seed=1)
    targets = torch.randint(0, 11, (n,), generator=torch.Generator().manual_seed(5))
    targets[::3] = -100
    # both take their softmax in fp32, so sums over rows differ in the seventh digit
    same_gradients("linear_cross_entropy", [hidden, weight], targets, rtol=3e-5)
    _, nll, argmax = by_torch.linear_cross_entropy(hidden, weight, targets)
    _, expected_nll, expected_argmax = reference.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-6)
    assert torch.equal(argmax, expected_argmax)
    assert nll[::3].abs().max() == 0


def test_bf16_stays_within_rounding_of_fp64() -> None:
    x, gate_up, down = leaf(50, 32), leaf(4, 64, 32, seed=1), leaf(4, 32, 32, seed=2)
    ids, weights = torch.arange(100).reshape(50, 2) % 4, leaf(50, 2, seed=3)
    exact = reference.grouped_experts(x, gate_up, down, ids, weights)
    rough = by_torch.grouped_experts(x.bfloat16(), gate_up.bfloat16(), down.bfloat16(), ids, weights.float())
    # each of the three products rounds once: relative error of a few 2^-8 of the result's norm
    error = (rough.double() - exact).norm() / exact.norm()
    assert error < 4 * 2**-8
