"""Attention of packed documents: the compiled kernels against the specification in fp64, on every instruction set.

Bounds on the norm of the error over that of the result. fp32: sums of up to 1300 products, rounding errors of u = 2⁻²⁴
that add up like √1300, about 36 u = 2.1e-6. bf16, unit roundoff 2⁻⁹: weights and their gradients are rounded before
they are multiplied, so is the result, and so is `out`, whose product with the gradient is subtracted: 4 · 2⁻⁹.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from by_form import by_kernels, by_torch
from torch import Tensor

from moestro import ops
from moestro.ops import library
from moestro.ops.training import reference

pytestmark = [
    pytest.mark.skipif(library.load_library() is None, reason="the native kernels are not built"),
    pytest.mark.usefixtures("two_threads"),
]

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(
    lengths: list[int], heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the bounds of documents: (query, key) heads, (key, value) widths."""
    starts = torch.tensor([0, *accumulate(lengths)])
    shapes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])]
    return [random(int(starts[-1]), *shape, seed=i).to(dtype) for i, shape in enumerate(shapes)], starts


def forward_backward(attention: Attention, inputs: list[Tensor], starts: Tensor, scale: float = 0.3) -> list[Tensor]:
    """Output, dq, dk, dv for one and the same gradient of the output."""
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs)
    out = attention(q, k, v, starts, scale)
    grad = random(*out.shape, seed=7).to(inputs[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """The specification with its softmax in fp64 too."""
    out = [v.new_empty(0, q.shape[1], v.shape[2])]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    for first, last in pairwise(starts.tolist()):
        qs, ks, vs = (t[first:last].transpose(0, 1) for t in (q, k, v))
        future = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
        p = (qs @ ks.transpose(1, 2) * scale).masked_fill(future, -torch.inf).softmax(-1)
        out.append((p @ vs).transpose(0, 1))
    return torch.cat(out)


def assert_close(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    close = 2.1e-6 if dtype == torch.float32 else 4 * 2**-9
    for name, one, other in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert float((one.double() - other).norm()) <= close * float(other.norm()) + 1e-30, name


CASES = [
    ([1], (1, 1), (1, 1)),
    ([1, 1, 0, 2], (3, 3), (5, 3)),
    ([7, 64, 65], (3, 1), (33, 17)),
    ([95, 96, 97], (4, 2), (16, 64)),
    ([63, 193, 1], (2, 2), (64, 16)),
    ([385, 3], (2, 1), (24, 40)),
    ([130], (6, 3), (192, 128)),
    ([600, 33], (2, 2), (8, 8)),
    ([1300], (3, 1), (7, 9)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "heads", "widths"), CASES)
def test_agrees_with_fp64(
    isa: str, lengths: list[int], heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs, starts = make_inputs(lengths, heads, widths, dtype)
    exact = forward_backward(exact_attention, [t.double() for t in inputs], starts)
    assert_close(forward_backward(by_kernels.packed_attention, inputs, starts), exact, dtype)


def test_the_specification_and_the_plain_way_share_key_heads_alike() -> None:
    inputs, starts = make_inputs([5, 130], (6, 2), (4, 3), torch.float64)
    exact = forward_backward(exact_attention, inputs, starts)
    for attention in (reference.packed_attention, by_torch.packed_attention):
        for ours, theirs in zip(forward_backward(attention, inputs, starts), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(isa: str, dtype: torch.dtype) -> None:
    for lengths in ([], [0], [0, 0]):
        inputs, starts = make_inputs(lengths, (2, 1), (4, 3), dtype)
        found = forward_backward(by_kernels.packed_attention, inputs, starts)
        assert [t.shape for t in found] == [(0, 2, 3), (0, 2, 4), (0, 1, 4), (0, 1, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    inputs, starts = make_inputs([1300, 70, 500], (4, 2), (24, 17), dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(forward_backward(by_kernels.packed_attention, inputs, starts))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    inputs, starts = make_inputs([31, 1100, 77], (2, 1), (9, 20), dtype)
    together = by_kernels.packed_attention(*inputs, starts, 0.2)
    for first, last in pairwise(starts.tolist()):
        alone = by_kernels.packed_attention(*(t[first:last] for t in inputs), torch.tensor([0, last - first]), 0.2)
        assert torch.equal(alone, together[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_read_where_they_lie(isa: str, dtype: torch.dtype) -> None:
    """Views of one buffer, keys that heads share, values that are no neighbours, gradients spread out."""
    buffer = random(70, 3, 31).to(dtype)
    q, v = buffer[..., 1:12], buffer[..., 12:31:2]
    shared = random(70, 1, 11, seed=2).to(dtype).expand(-1, 3, -1)
    views = [t.detach().requires_grad_() for t in (q, shared, v)]
    copies = [t.detach().clone().contiguous().requires_grad_() for t in views]
    grad = torch.ones((), dtype=dtype).expand(70, 3, v.shape[2])
    found = []
    for inputs in (views, copies):
        out = by_kernels.packed_attention(*inputs, torch.tensor([0, 30, 70]), 0.3)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_large_scores_neither_overflow_nor_lose_the_largest(isa: str) -> None:
    inputs, starts = make_inputs([200], (2, 2), (16, 8), torch.float32)
    inputs[0] *= 1000
    exact = forward_backward(exact_attention, [t.double() for t in inputs], starts)
    found = forward_backward(by_kernels.packed_attention, inputs, starts)
    assert all(bool(t.isfinite().all()) for t in found)
    assert float((found[0] - exact[0]).norm()) <= 1e-3 * float(exact[0].norm())


def test_what_is_not_finite_stays_in_its_document(isa: str) -> None:
    inputs, starts = make_inputs([40, 50], (2, 2), (8, 8), torch.float32)
    inputs[1][3, 0, 2] = torch.nan
    out = by_kernels.packed_attention(*inputs, starts, 0.3)
    assert out[3:40, 0].isnan().all() and out[:3].isfinite().all()
    assert out[:, 1].isfinite().all() and out[40:].isfinite().all()


def test_memory_is_linear_in_the_length() -> None:
    """16,384 tokens in one document and one head: all scores would be 1 GiB; a process grows by less than a tenth."""
    code = """
import resource, torch
from moestro.ops import packed_attention
q, k, v = (torch.randn(16384, 1, width, requires_grad=True) for width in (8, 8, 4))
packed_attention(q[:64], k[:64], v[:64], torch.tensor([0, 64]), 0.3).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
packed_attention(q, k, v, torch.tensor([0, 16384]), 0.3).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 1024  # KiB


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_go_another_way(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(library, "call", lambda *arguments: pytest.fail("the kernels were called"))
    inputs, starts = make_inputs([5, 9], (2, 1), (4, 3), torch.float32)
    inputs = [t.to(dtype) for t in inputs]
    found, plain = (f(*inputs, starts, 0.3) for f in (ops.packed_attention, by_torch.packed_attention))
    assert torch.equal(found, plain)


def test_the_kernels_are_what_is_chosen() -> None:
    inputs, starts = make_inputs([5, 130], (2, 1), (4, 3), torch.float32)
    by_choice, by_the_kernels = (f(*inputs, starts, 0.3) for f in (ops.packed_attention, by_kernels.packed_attention))
    assert torch.equal(by_choice, by_the_kernels)
    assert not torch.equal(by_choice, by_torch.packed_attention(*inputs, starts, 0.3))


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = random(5, 4, 3), random(5, 2, 3), random(5, 2, 6)
    for wrong in ((q, k[:4], v), (q, k, v[:4]), (q, k[..., :2], v), (q, k[:, :1], v)):
        with pytest.raises(ValueError, match="cannot attend: queries"):
            by_kernels.packed_attention(*wrong, torch.tensor([0, 5]), 0.3)
    with pytest.raises(RuntimeError, match="impossible size"):
        by_kernels.packed_attention(q[:, :3], k, v, torch.tensor([0, 5]), 0.3)


@pytest.mark.parametrize("starts", [[0, 4], [0, 6], [1, 5], [0, 3, 2, 5], [0, -1, 5]])
def test_hostile_bounds_are_refused(starts: list[int]) -> None:
    q = random(5, 1, 3)
    with pytest.raises(RuntimeError, match="impossible size"):
        by_kernels.packed_attention(q, q, q, torch.tensor(starts), 0.3)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"rows": -1}, 2), ({"rows": 2**62}, 2), ({"documents": -1}, 2), ({"heads": 0}, 2), ({"kv_heads": 0}, 2),
        ({"key": 0}, 2), ({"key": 2**62}, 2), ({"value": 0}, 2), ({"value": 2**61}, 2), ({"threads": 0}, 2),
        ({"type": 9}, 1),
    ],
)  # fmt: skip
def test_hostile_sizes_are_refused(change: dict[str, int], code: int) -> None:
    kernels = library.load_library()
    assert kernels is not None
    sizes = {"documents": 1, "rows": 4, "heads": 1, "kv_heads": 1, "key": 2, "value": 2, "scale": 1.0, "type": 0}
    out, q = torch.full((4, 2), 5.0), random(4, 2)
    bounds, strides = torch.tensor([0, 4]), torch.tensor([2] * 8)
    pointers = [t.data_ptr() for t in (out, out, q, q, q, bounds, strides)]
    assert kernels.moestro_flash_forward(*pointers, *(sizes | {"threads": 1} | change).values()) == code
    pointers = [t.data_ptr() for t in (out, out, out, q, q, q, q, q, q, bounds, strides)]
    assert kernels.moestro_flash_backward(*pointers, *(sizes | {"threads": 1} | change).values()) == code
    assert bool((out == 5.0).all())


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("stride", [-1, 2**62])
def test_hostile_strides_are_refused(place: int, stride: int) -> None:
    q, strides = random(4, 1, 2), torch.tensor([2] * 8)
    strides[place] = stride
    out, sizes = torch.full((4, 2), 5.0), (1, 4, 1, 1, 2, 2, 1.0, 0, 1)
    with pytest.raises(RuntimeError, match="impossible size"):
        library.call("moestro_flash_backward", out, out, out, q, q, q, q, q, q, torch.tensor([0, 4]), strides, *sizes)
    assert bool((out == 5.0).all())
