"""Linear layers and the output head in the kernels, against plain torch in fp64, forward and backward.

Bounds: a sum of K products in fp32 errs by at most about K·eps·Σ|a||b|; results in bf16 add 2⁻⁸ of themselves, and so
do the gradients of logits, which are rounded to bf16 before they are multiplied.
"""

from __future__ import annotations

import pytest
import torch
from by_form import by_kernels
from torch import Tensor

from moestro import ops
from moestro.ops import library
from moestro.ops.training import native, reference

pytestmark = [
    pytest.mark.skipif(library.load_library() is None, reason="the native kernels are not built"),
    pytest.mark.usefixtures("two_threads"),
]
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounding(dtype: torch.dtype) -> float:
    return 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 1, 1), (33, 17, 65), (130, 600, 40), (1100, 24, 530), (0, 4, 3)]
)
def test_linear_and_its_gradients(isa: str, dtype: torch.dtype, rows: int, inner: int, outer: int) -> None:
    x, weight, d_out = (
        random(rows, inner).to(dtype),
        random(outer, inner, seed=1).to(dtype),
        random(rows, outer, seed=2),
    )
    d_out = d_out.to(dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = by_kernels.linear(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, d_out)]
    a, w, d = x.detach().double(), weight.detach().double(), d_out.double()
    for value, exact, size, length in (
        (found[0], a @ w.T, a.abs() @ w.T.abs(), inner),
        (found[1], d @ w, d.abs() @ w.abs(), outer),
        (found[2], d.T @ a, d.T.abs() @ a.abs(), rows),
    ):
        bound = (length + 2) * 2.0**-24 * size + rounding(dtype) * exact.abs() + 1e-30
        assert bool(((value.double() - exact).abs() <= bound).all())


def test_linear_keeps_leading_dimensions_and_takes_strided_rows(isa: str) -> None:
    x, weight = random(3, 5, 20)[:, :, 2:12], random(7, 10, seed=1)
    torch.testing.assert_close(by_kernels.linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 3, 1), (5, 8, 2), (97, 33, 17), (2100, 40, 333), (100, 16, 9000)]
)
def test_cross_entropy_and_its_gradients(isa: str, dtype: torch.dtype, rows: int, width: int, vocabulary: int) -> None:
    hidden, weight = random(rows, width).to(dtype), random(vocabulary, width, seed=1).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    targets[1::3] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    total, nll, argmax = by_kernels.linear_cross_entropy(*leaves, targets)
    found = torch.autograd.grad(total * 3, leaves)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = exact_leaves[0] @ exact_leaves[1].T
    exact = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    gradients = torch.autograd.grad(exact.sum() * 3, exact_leaves)
    torch.testing.assert_close(nll.double(), exact.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(total, nll.sum())
    likeliest = logits.detach().gather(1, argmax[:, None])[:, 0]
    assert bool((logits.detach().amax(1) - likeliest <= 1e-5 * logits.detach().abs().amax(1)).all())
    assert bool((nll[targets < 0] == 0).all())
    for value, expected in zip(found, gradients, strict=True):
        error = (value.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < (3 * 2.0**-8 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_is_the_same_for_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    hidden, weight = random(300, 40).to(dtype).requires_grad_(), random(500, 40, seed=1).to(dtype).requires_grad_()
    targets = torch.arange(300)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        total, nll, _ = by_kernels.linear_cross_entropy(hidden, weight, targets)
        return [nll, *torch.autograd.grad(total, [hidden, weight])]

    for threads in (1, 3):
        for ours, theirs in zip(run(threads), run(2), strict=True):
            assert torch.equal(ours, theirs)


def test_cross_entropy_of_no_rows_and_without_gradients(isa: str) -> None:
    weight = random(5, 4).requires_grad_()
    total, nll, _ = by_kernels.linear_cross_entropy(random(0, 4), weight, torch.empty(0, dtype=torch.int64))
    assert len(nll) == 0
    assert bool((torch.autograd.grad(total, weight)[0] == 0).all())
    hidden, targets = random(7, 4), torch.arange(7) % 5
    with torch.no_grad():
        _, nll, argmax = by_kernels.linear_cross_entropy(hidden, weight, targets)
    expected = reference.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(nll, expected[1].detach())
    assert torch.equal(argmax, expected[2])


def test_logits_that_are_not_finite_give_losses_that_are_not(isa: str) -> None:
    hidden, weight = random(40, 8), random(20, 8, seed=1)
    hidden[3, 2] = torch.nan
    _, nll, _ = by_kernels.linear_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.int64))
    assert bool(nll[3].isnan())
    assert bool(nll[4:].isfinite().all())


def test_hostile_targets_are_refused() -> None:
    with pytest.raises(RuntimeError, match="impossible size"):
        by_kernels.linear_cross_entropy(random(4, 3), random(5, 3), torch.tensor([0, 1, 5, 2]))


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "linear_forward", lambda *arguments: pytest.fail("the kernels were called"))
    monkeypatch.setattr(library, "multiplies_faster", lambda dtype: False)
    x, weight = random(64, 8), random(5, 8)
    assert torch.equal(ops.linear(x, weight), x @ weight.T)
    monkeypatch.setattr(library, "multiplies_faster", lambda dtype: True)
    assert torch.equal(ops.linear(x[:3], weight), x[:3] @ weight.T)  # few rows are not worth packing
    assert torch.equal(ops.linear(x.double(), weight.double()), x.double() @ weight.double().T)
