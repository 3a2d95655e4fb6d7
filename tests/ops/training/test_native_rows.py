"""RMSNorm, SwiGLU and joined heads with their gradients, native and plain, against the specification in fp64.

Bounds: one rounding of a result, and up to 32 of fp32 on the way, relative to what was added up; a gradient that is a
sum over rows has one more for every row of a block and for every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from instruction_sets import runnable
from torch import Tensor

from moestro import ops
from moestro.ops import library
from moestro.ops.training import reference

pytestmark = pytest.mark.usefixtures("two_threads")
DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(0, 2, 3, 4), (1, 1, 0, 2), (5, 3, 7, 0), (9, 4, 5, 6), (600, 3, 32, 130)]
SIZES = [(0, 8), (1, 1), (3, 16), (5, 37), (40, 64), (2100, 33), (7, 5000), (4, 0)]
needs_kernels = pytest.mark.skipif(library.load_library() is None, reason="the native kernels are not built")


@pytest.fixture(params=[*runnable(), "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, then plain torch."""
    kernels, best = library.load_library(), library.current_isa()
    if request.param == "plain":
        monkeypatch.setattr(library, "load_library", lambda: None)
    else:
        assert kernels is not None and kernels.moestro_set_isa(request.param.encode()) == 0
    yield request.param
    if kernels is not None:
        kernels.moestro_set_isa(best.encode())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(function: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor, *rest: object) -> list[Tensor]:
    """The result and the gradients of the inputs, all as they come."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, *rest)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves)]


def check(actual: list[Tensor], exact: list[Tensor], sizes: list[Tensor | float]) -> None:
    """Each value errs by at most some roundings of its type and of fp32, relative to itself and to what it summed."""
    for got, want, size in zip(actual, exact, sizes, strict=True):
        rounding = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-24
        bound = rounding * want.abs() + 2.0**-19 * size + 1e-30
        assert got.shape == want.shape
        assert bool(((got.double() - want).abs() <= bound).all())


def slack(path: str, dtype: torch.dtype) -> float:
    """Plain torch rounds bf16 at every step, which the fp64 bounds do not allow for."""
    return 2.0**14 if path == "plain" and dtype == torch.bfloat16 else 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_rms_norm(path: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for rows, width in SIZES[:-1]:
        x, d_out = random(rows, width).to(dtype), random(rows, width, seed=1).to(dtype)
        weight = (random(width, seed=2) + 1).to(weight_dtype)
        wide = [x.double(), weight.double()]
        exact = run(reference.rms_norm, wide, d_out.double(), 1e-6)
        r = (wide[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        g = (d_out.double() * wide[1]).abs()
        along = (g * wide[0].abs()).mean(-1, keepdim=True) * wide[0].abs() * r**2
        sums = (d_out.double() * wide[0] * r).abs().sum(0)
        sizes = [exact[0].abs(), r * (g + along), sums * (rows / 64 + 96) / 32]
        check(run(ops.rms_norm, [x, weight], d_out, 1e-6), exact, [slack(path, dtype) * s for s in sizes])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(path: str, dtype: torch.dtype) -> None:
    for rows, width in SIZES:
        gate_up, d_out = (4 * random(rows, 2 * width)).to(dtype), random(rows, width, seed=1).to(dtype)
        exact = run(reference.swiglu, [gate_up.double()], d_out.double())
        gate, up = gate_up.double().abs().chunk(2, -1)
        d = d_out.double().abs()
        sizes = [gate * up, torch.cat([d * up * (1 + gate), d * gate], -1)]
        check(run(ops.swiglu, [gate_up], d_out), exact, [slack(path, dtype) * s for s in sizes])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_join_heads(path: str, dtype: torch.dtype, shared: bool) -> None:
    """The parts are slices of wider rows, as they are in the model."""
    for rows, heads, plain_width, rotary_width in HEADS:
        rows_of = random(rows, heads, plain_width + rotary_width + 3).to(dtype)
        plain, rotary, _ = rows_of.split([plain_width, rotary_width, 3], -1)
        if shared:
            rotary = random(rows, rotary_width + 5, seed=3).to(dtype)[:, 5:]
        angles = random(rows, rotary_width // 2, seed=4)
        tables = (angles.cos(), angles.sin())
        d_out = random(rows, heads, plain_width + rotary_width, seed=1).to(dtype)
        exact = run(reference.join_heads, [plain.double(), rotary.double()], d_out.double(), tables)
        sums = 16 * d_out.double().abs().sum((1, 2))
        sizes = [4.0, 1.0, sums[:, None] if shared else sums[:, None, None]]
        actual = run(ops.join_heads, [plain, rotary], d_out, tables)
        check(actual, exact, [slack(path, dtype) * s for s in sizes])
        assert torch.equal(actual[0][..., :plain_width], plain)
        assert torch.equal(actual[1], d_out[..., :plain_width])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, d_out, weight = random(3001, 129).to(dtype), random(3001, 129, seed=1).to(dtype), random(129, seed=2)
    both, heads = random(3001, 258).to(dtype), random(3001, 3, 43).to(dtype)
    rotary, angles = random(3001, 8, seed=3).to(dtype), random(3001, 4, seed=4)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            run(ops.rms_norm, [x, weight], d_out, 1e-6)
            + run(ops.swiglu, [both], d_out)
            + run(ops.join_heads, [heads, rotary], random(3001, 3, 51, seed=5), (angles.cos(), angles.sin()))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_the_others(path: str) -> None:
    if path == "plain":
        pytest.skip("plain torch chooses its order by the shape")
    x, weight, d_out = random(2000, 65), random(65, seed=1), random(2000, 65, seed=2)
    whole = run(ops.rms_norm, [x, weight], d_out, 1e-6)
    part = run(ops.rms_norm, [x[7:9], weight], d_out[7:9], 1e-6)
    assert all(torch.equal(a[7:9], b) for a, b in zip(whole[:2], part[:2], strict=True))
    both = random(2000, 130)
    whole = run(ops.swiglu, [both], d_out)
    part = run(ops.swiglu, [both[7:9]], d_out[7:9])
    assert all(torch.equal(a[7:9], b) for a, b in zip(whole, part, strict=True))


@needs_kernels
def test_values_that_are_not_finite_stay_in_their_row() -> None:
    x, weight = random(4, 20), torch.ones(20)
    x[1, 3], x[2] = float("nan"), float("inf")
    out, dx, _ = run(ops.rms_norm, [x, weight], torch.ones(4, 20), 1e-6)
    for t in (out, dx):
        assert t.isfinite().all(-1).tolist() == [True, False, False, True]
    zeros = run(ops.rms_norm, [torch.zeros(2, 20), weight], torch.ones(2, 20), 1e-6)
    assert all(bool(t.isfinite().all()) for t in zeros)
    large = torch.tensor([[100.0, -100.0, 1e30, -1e30, 1.0, 1.0, 1.0, 1.0]])
    assert all(bool(t.isfinite().all()) for t in run(ops.swiglu, [large], torch.ones(1, 4)))


@needs_kernels
def test_what_does_not_fit_is_refused() -> None:
    angles = torch.zeros(3, 2)
    for plain, rotary in [((3, 2, 4), (2, 4)), ((3, 2, 4), (3, 3, 4)), ((3, 2, 4), (3, 6)), ((3, 2, 4), (3, 5))]:
        with pytest.raises(ValueError, match="cannot join heads"):
            ops.join_heads(torch.zeros(plain), torch.zeros(rotary), (angles, angles))
    some = torch.zeros(4)
    for arguments in [(-1, 4, 1e-6, 0, 0, 1), (2**41, 4, 1e-6, 0, 0, 1), (1, 4, 1e-6, 0, 0, 0), (1, 4, 1e-6, 0, 7, 1)]:
        with pytest.raises(RuntimeError, match="moestro_rms_norm_backward"):
            library.call("moestro_rms_norm_backward", some, some, some, some, some, *arguments)
    for strides in [(2**41, 0, 0, 0), (4, -1, 0, 0), (4, 4, -4, 0)]:
        with pytest.raises(RuntimeError, match="impossible size"):
            library.call("moestro_join_heads", some, some, some, some, some, 1, 1, 2, 2, *strides, 0, 1)
    with pytest.raises(RuntimeError, match="impossible size"):
        library.call("moestro_split_heads", some, some, some, some, some, 1, 1, 1, 3, 0, 0, 1)
    with pytest.raises(RuntimeError, match="impossible size"):
        library.call("moestro_swiglu_backward", some, some, some, 2**30, 2**12, 0, 1)
