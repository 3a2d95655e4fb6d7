"""FP8 layers: codes against brute force, products against fp64, layers and gradients against the specification."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from moestro import ops
from moestro.ops.fp8 import SQUARE, TILE, Block
from moestro.ops.precision import Format, Fp8Recipe, read_recipe
from moestro.ops.training import devices, forms, fp8, fused_fp8, native_fp8, reference_fp8
from moestro.ops.training.reference_fp8 import COLUMN

RECIPES = [
    Fp8Recipe(),
    Fp8Recipe(transpose="both"),
    Fp8Recipe(scale="ue8m0"),
    Fp8Recipe(tile="tensor"),
    Fp8Recipe(dgrad_tile="square"),
]
E5M6 = [Fp8Recipe(inputs="e5m6"), Fp8Recipe(inputs="e5m6", transpose="both")]
FORMATS: dict[Format, tuple[int, int]] = {"e4m3": (3, -6), "e5m6": (6, -14)}  # fraction bits, least exponent
LARGEST = {"e4m3": 448.0, "e5m6": 65024.0}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def name(recipe: Fp8Recipe) -> str:
    return recipe.key


def grid(format: Format) -> np.ndarray:
    """Every magnitude of a format in ascending order, so that the even ones of a tie are at even places."""
    fraction, least = FORMATS[format]
    small = [k * 2.0 ** (least - fraction) for k in range(2**fraction)]
    tops = range(least, 16 if format == "e5m6" else 9)
    normal = [(1 + k / 2**fraction) * 2.0**e for e in tops for k in range(2**fraction)]
    return np.array([v for v in (*small, *normal) if v <= LARGEST[format]])


def brute_force(x: np.ndarray, format: Format, power_of_two: bool) -> tuple[np.ndarray, np.float32]:
    """Values of the codes of one block, and its scale, by searching all codes."""
    with np.errstate(all="ignore"):
        scale = np.float32(np.abs(x).max()) / np.float32(LARGEST[format])
        if scale < 2.0**-126:
            scale = np.float32(1)
        elif power_of_two and np.isfinite(scale):
            mantissa, exponent = math.frexp(scale)
            scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
        ratio = (x.astype(np.float32) / scale).astype(np.float64)
    codes, size = grid(format), np.abs(ratio)
    above = np.minimum(np.searchsorted(codes, size), len(codes) - 1)
    below = np.maximum(above - 1, 0)
    up, down = codes[above] - size, size - codes[below]
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.where(np.isnan(ratio), np.nan, np.copysign(codes[nearest], ratio)), scale


def hard_values() -> Tensor:
    """[260, 140] fp32 with ties, subnormal codes, signed zeros, zero blocks, infinities and NaNs, tiny blocks."""
    x = random(260, 140) * torch.exp2(random(260, 1, seed=1) * 20)
    x[:, ::5] *= 2.0**-12
    x[3, ::3] = -0.0
    x[4] = 0
    x[5], x[6] = 1e-41, 2.0**-120 * random(140)
    x[7] = torch.linspace(-448, 448, 140)
    x[8] = torch.arange(140) / 16.0 * 3.2  # ties once the largest is 448
    x[8, 5] = 448
    x[9, 100], x[10, 3] = torch.inf, torch.nan
    x[11] *= 2.0**90
    return x


def blocks_of(x: Tensor, block: Block, bounds: Sequence[int]) -> list[tuple[int, int, Tensor]]:
    """(row of scales, column of scales, values) of every block; rows of blocks begin anew at bounds."""
    found, row = [], 0
    for start, end in itertools.pairwise(bounds):
        for part in x[start:end].split(block[0]) if end > start else ():
            found += [(row, column, tile) for column, tile in enumerate(part.split(block[1], 1))]
            row += 1
    return found


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "scale"), [("e4m3", "fp32"), ("e4m3", "ue8m0"), ("e5m6", "fp32")])
@pytest.mark.parametrize("block", [TILE, COLUMN, SQUARE], ids=str)
def test_codes_and_scales_are_those_of_brute_force(path: str, block: Block, dtype: torch.dtype, format, scale) -> None:  # type: ignore[no-untyped-def]
    x, bounds = hard_values().to(dtype), [0, 131, 131, 260]
    by = fused_fp8 if path == "plain" else native_fp8
    found = by.quantize(
        x, block, Fp8Recipe(scale=scale), format=format, bounds=torch.tensor(bounds), keep=format == "e4m3"
    )
    values = found.values.float().numpy()
    place = 0
    for row, column, tile in blocks_of(x, block, bounds):
        want, of_block = brute_force(tile.float().numpy(), format, scale == "ue8m0" or format == "e5m6")
        got = values[place : place + len(tile), column * block[1] : column * block[1] + tile.shape[1]]
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got) & ~np.isnan(got), np.signbit(want) & ~np.isnan(want))
        np.testing.assert_equal(found.scales[row, column].numpy(), of_block)
        if (column + 1) * block[1] >= x.shape[1]:
            place += len(tile)
    if format == "e4m3":
        np.testing.assert_array_equal(found.codes.view(torch.float8_e4m3fn).float().numpy(), values)
        assert torch.equal(by.widen(found.codes).nan_to_num(1), found.values.nan_to_num(1))


@pytest.mark.usefixtures("path")
def test_kept_codes_are_chosen_and_quantised_again(path: str) -> None:
    by = fused_fp8 if path == "plain" else native_fp8
    x, rows, bounds = random(50, 200).bfloat16(), torch.randint(0, 50, (300,)), torch.tensor([0, 130, 290])
    kept = by.quantize(x, TILE, Fp8Recipe(), keep=True)
    found = by.quantize(kept.codes, COLUMN, Fp8Recipe(), bounds=bounds, rows=rows, x_scales=kept.scales)
    wide = reference_fp8.read_back(kept.values, kept.scales)[rows]
    for part, tiles in ((slice(0, 130), slice(0, 2)), (slice(130, 290), slice(2, 4))):
        values, scales = reference_fp8.quantize(wide[part], COLUMN, Fp8Recipe())
        assert torch.equal(found.values[part], values) and torch.equal(found.scales[tiles], scales)


def exact_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> tuple[Tensor, Tensor]:
    """Σ of codes [M, K], [N, K] times scales [M, K'], [N, K'] in fp64, and the sum of magnitudes."""
    wide = [
        t.double() * s.double().repeat_interleave(128, 1)[:, : t.shape[1]] for t, s in ((a, a_scales), (b, b_scales))
    ]
    return wide[0] @ wide[1].T, wide[0].abs() @ wide[1].abs().T


def assert_close(found: Tensor, exact: tuple[Tensor, Tensor]) -> None:
    """Within one rounding of the result, and those of fp32 sums on the way."""
    rounding = 2.0**-8 if found.dtype == torch.bfloat16 else 2.0**-23
    bound = rounding * exact[0].abs() + 2.0**-20 * exact[1]
    assert bool(((found.double() - exact[0]).abs() <= bound).all())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("m", "k"), [(150, 330), (1, 1), (128, 128), (257, 1100)])
def test_products_are_those_of_codes_in_fp64(path: str, m: int, k: int) -> None:
    by, recipe = (fused_fp8 if path == "plain" else native_fp8), Fp8Recipe()
    bounds, rows = torch.tensor([0, 100, 100, 103]), torch.randint(0, 40, (110,))
    x, weight = random(40, k).bfloat16(), by.quantize_weight(random(3, m, k, seed=1), recipe)
    a, dy = by.quantize(x, TILE, recipe), random(110, m, seed=2).bfloat16()
    out = by.multiply(a, rows, [weight], bounds, recipe)
    down, along = by.quantize(dy, TILE, recipe), by.quantize(dy, COLUMN, recipe, bounds=bounds)
    back = by.multiply_back(down, None, [weight], bounds, recipe)
    inputs = by.quantize(x, COLUMN, recipe, bounds=bounds, rows=rows)
    turned = by.multiply_columns(along, inputs, bounds, recipe)
    assert (out.dtype, back.dtype, turned.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for expert, part, tiles in ((0, slice(0, 100), slice(0, 1)), (2, slice(100, 103), slice(1, 2))):
        w, scales = weight.values[expert], weight.scales[expert]
        of_rows, of_columns = scales.repeat_interleave(128, 0)[:m], scales.repeat_interleave(128, 1)[:, :k]
        assert_close(out[part], exact_product(a.values[rows[part]], a.scales[rows[part]], w, of_rows))
        assert_close(back[part], exact_product(down.values[part], down.scales[part], w.T, of_columns.T))
        sides = [(t.values[part].T, t.scales[tiles].T) for t in (along, inputs)]
        assert_close(turned[expert], exact_product(*sides[0], *sides[1]))
    assert not turned[1].any()


def near(found: Sequence[Tensor | None], expected: Sequence[Tensor], least: float = 2e-3) -> None:
    """Equal but for sums in another order, which now and then round an activation or a code the other way."""
    for got, want in zip(found, expected, strict=True):
        assert got is not None and got.shape == want.shape
        error, size = ((got.float() - want.float()).norm(), want.float().norm())
        assert error.item() <= least * size.item()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("recipe", [*RECIPES, *E5M6], ids=name)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(300, 200, 150), (5, 33, 7)])
def test_a_linear_layer_is_as_specified(recipe: Fp8Recipe, rows: int, inputs: int, outputs: int) -> None:
    x = random(rows, inputs).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(random(outputs, inputs, seed=1) / 8)
    dy = random(rows, outputs, seed=2).bfloat16()
    out = ops.linear(x, weight, recipe)
    out.backward(dy)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    with torch.no_grad():
        near([out], [reference_fp8.linear(x, weight, recipe)])
        near([x.grad, weight.grad], reference_fp8.linear_gradients(dy, x, weight, recipe))
        wide = x.float()
        exact = wide @ weight.T, dy.float() @ weight, dy.float().T @ wide
    near([out, x.grad, weight.grad], exact, 0.06)  # what E4M3 rounds: 2^-4, at random, of both sides, at most thrice


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("recipe", RECIPES, ids=name)
@pytest.mark.parametrize("stacked", [True, False])
def test_experts_are_as_specified(recipe: Fp8Recipe, stacked: bool) -> None:
    tokens, hidden, width, count = 150, 140, 72, 4
    x, dy = random(tokens, hidden).bfloat16().requires_grad_(), random(tokens, hidden, seed=1).bfloat16()
    gate_up, down = random(count, 2 * width, hidden, seed=2) / 8, random(count, hidden, width, seed=3) / 8
    ids = torch.randint(0, count + 1, (tokens, 2), generator=torch.Generator().manual_seed(4))
    ids[ids == 2] = 1  # one expert without tokens; id 4 is dropped
    weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(5)).requires_grad_()
    leaves = [torch.nn.Parameter(m.clone()) for stack in (gate_up, down) for m in ([stack] if stacked else stack)]
    half = len(leaves) // 2
    given = leaves if stacked else (leaves[:half], leaves[half:])
    out = ops.grouped_experts(x, given[0], given[1], ids, weights, recipe)
    out.backward(dy)
    grads = [leaf.grad for leaf in leaves]
    of_stacks = grads if stacked else [torch.stack(grads[:half]), torch.stack(grads[half:])]  # type: ignore[arg-type]
    with torch.no_grad():
        near([out], [reference_fp8.experts(x, gate_up, down, ids, weights, recipe)])
        found = reference_fp8.experts_gradients(dy, x, (gate_up, down), ids, weights, recipe)
    near([x.grad, weights.grad, *of_stacks], found)
    exact_x, exact_weights = (t.detach().float().requires_grad_() for t in (x, weights))
    exact = [gate_up.requires_grad_(), down.requires_grad_()]
    exact_out = ops.grouped_experts(exact_x, exact[0], exact[1], ids, exact_weights, "fp32")
    exact_out.backward(dy.float())
    near([out], [exact_out], 0.12)
    near([x.grad, weights.grad, *of_stacks], [t.grad for t in (exact_x, exact_weights, *exact)], 0.12)  # type: ignore[misc]


@pytest.mark.usefixtures("path")
def test_a_feed_forward_layer_is_one_expert() -> None:
    x, dy = random(3, 50, 140).bfloat16().requires_grad_(), random(150, 140, seed=1).bfloat16()
    gate_up, down = (torch.nn.Parameter(random(*s, seed=2) / 8) for s in ((144, 140), (140, 72)))
    out = ops.mlp(x, gate_up, down, Fp8Recipe())
    out.backward(dy.view(out.shape))
    ids, ones = torch.zeros(150, 1, dtype=torch.int64), torch.ones(150, 1)
    stacks = gate_up[None].detach(), down[None].detach()
    rows = x.detach().view(150, 140)
    near([out.view(150, 140)], [reference_fp8.experts(rows, *stacks, ids, ones, Fp8Recipe())])
    dx, _, *d_weights = reference_fp8.experts_gradients(dy, rows, stacks, ids, ones, Fp8Recipe())
    assert x.grad is not None
    near([x.grad.view(150, 140), gate_up.grad, down.grad], [dx, *(d[0] for d in d_weights)])


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_the_number_of_threads_changes_no_bit(isa: str, recipe: Fp8Recipe) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, weights = random(300, 140).bfloat16().requires_grad_(), random(300, 2, seed=3).sigmoid()
        leaves = [torch.nn.Parameter(random(*s, seed=1)) for s in ((3, 144, 140), (3, 140, 72), (90, 140))]
        ids = torch.arange(600).view(300, 2) % 3
        out = ops.linear(ops.grouped_experts(x, leaves[0], leaves[1], ids, weights, recipe), leaves[2], recipe)
        out.backward(random(300, 90, seed=2).bfloat16())
        results.append([out, x.grad, *(leaf.grad for leaf in leaves)])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("promote", "tile"), [(32, "block"), (128, "block"), (256, "tensor")])
def test_hopper_sums_are_added_at_every_promotion(monkeypatch: pytest.MonkeyPatch, promote: int, tile) -> None:  # type: ignore[no-untyped-def]
    seen = []

    def block_products(a: Tensor, b: Tensor, length: int) -> Tensor:  # exact sums, so only the order differs
        seen.append((a.shape[1], length))
        return torch.stack([p @ q.T for p, q in zip(a.split(length, 1), b.split(length, 1), strict=True)])

    module = types.ModuleType("moestro.ops.hopper")
    module.block_products = block_products  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moestro.ops.hopper", module)
    x, weight = random(20, 300).bfloat16(), random(10, 300, seed=1)
    recipe = Fp8Recipe(accumulate="hopper", promote=promote, tile=tile)
    near([ops.linear(x, weight, recipe)], [ops.linear(x, weight, Fp8Recipe(tile=tile))])
    assert seen and all(length == promote and columns % promote == 0 for columns, length in seen)


def saved_tensors(run: Callable[[], object]) -> list[Tensor]:
    """What autograd keeps while `run` computes."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return kept


def test_activations_are_kept_in_fp8_and_once() -> None:
    x, ids = random(40, 200).bfloat16().requires_grad_(), torch.zeros(40, 1, dtype=torch.int64)
    weight, gate_up, down = (torch.nn.Parameter(random(*s)) for s in ((30, 200), (1, 60, 200), (1, 200, 30)))

    def run() -> None:
        ops.linear(x, weight, Fp8Recipe())
        ops.grouped_experts(x, gate_up, down, ids, torch.ones(40, 1), Fp8Recipe())

    kept = [t for t in saved_tensors(run) if not isinstance(t, torch.nn.Parameter) and t.dim() == 2 and t.shape[1] > 2]
    assert {t.dtype for t in kept} == {torch.uint8}
    assert len({t.data_ptr() for t in kept}) == 2  # x for both layers, and h
    recipe = Fp8Recipe(inputs="e5m6")
    wide = [t for t in saved_tensors(lambda: ops.linear(x, weight, recipe)) if t.shape == x.shape]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]  # attention keeps it, too


def test_weights_and_inputs_are_quantised_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    original = reference_fp8.quantize

    def counted(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        calls.append(tuple(x.shape))
        return original(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_fp8, "quantize", counted)
    x, weight = random(5, 6).bfloat16(), torch.nn.Parameter(random(7, 6))
    for _ in range(2):
        fp8.linear(x, weight, Fp8Recipe(), "torch")
    assert sorted(calls) == [(5, 6), (7, 6)]
    with torch.no_grad():
        weight.mul_(2)
        x.mul_(2)
    doubled = fp8.linear(x, weight, Fp8Recipe(), "torch")
    assert sorted(calls) == [(5, 6), (5, 6), (7, 6), (7, 6)]
    forms.forget()
    assert torch.equal(fp8.linear(x, weight, Fp8Recipe(), "torch"), doubled)
    assert len(calls) == 6


@pytest.mark.parametrize("recipe", [*RECIPES, *E5M6], ids=name)
def test_operators_tell_the_shapes_that_they_give(recipe: Fp8Recipe) -> None:
    x, weight, how = random(130, 140).bfloat16(), random(30, 140), f"{recipe.key}/"
    values, scales, codes = torch.ops.moestro.fp8_inputs(x, how)
    kept = (codes, scales)
    if recipe.inputs == "e5m6":
        kept = (x, codes)
    elif recipe.transpose == "both":
        kept = torch.ops.moestro.fp8_turned(x, how)
        opcheck("fp8_turned", x, how)
    opcheck("fp8_inputs", x, how)
    opcheck("fp8_linear", values, scales, weight, how)
    for wanted in ([True, True], [True, False], [False, True]):
        dy = random(130, 30).bfloat16()
        opcheck("fp8_linear_backward", dy, weight, [*kept], wanted, how)
    if recipe.inputs == "e5m6":
        return
    matrices, ids = [random(3, 40, 140), random(3, 140, 20)], torch.arange(260).view(130, 2) % 4
    weights = torch.rand(130, 2)
    opcheck("fp8_experts", x, [values, scales], matrices, ids, weights, how)
    _, *rest = torch.ops.moestro.fp8_experts(x, [values, scales], matrices, ids, weights, how)
    if recipe.transpose != "both":
        rest[:2] = [codes, scales]
    opcheck("fp8_experts_backward", x, matrices, weights, rest, how)


def opcheck(operator: str, *arguments: object) -> None:
    torch.library.opcheck(
        getattr(torch.ops.moestro, operator).default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_a_key_names_its_recipe() -> None:
    recipe = Fp8Recipe("ue8m0", "both", "hopper", 64, "tensor", "square", "e5m6")
    assert read_recipe(recipe.key) == recipe


def test_torch_takes_the_layout_of_scales_for_gpus() -> None:
    """By its own rules for shapes and strides, without a GPU."""
    with torch.device("meta"):
        a, b = (torch.empty(n, 256, dtype=torch.bfloat16) for n in (96, 48))
        out = devices.fp8_product(a, torch.empty(96, 2), b, torch.empty(48, 2))
    assert (out.shape, out.dtype) == ((96, 48), torch.float32)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_a_hopper_gpu_computes_the_same() -> None:
    results = []
    for device in ("cpu", "cuda"):
        x = random(256, 256).bfloat16().to(device).requires_grad_()
        weight = torch.nn.Parameter(random(128, 256, seed=1).to(device))
        out = ops.linear(x, weight, Fp8Recipe())
        out.backward(random(256, 128, seed=2).bfloat16().to(device))
        results.append([t.cpu() for t in (out, x.grad, weight.grad) if t is not None])
    near(results[1], results[0], 1e-2)  # Hopper's sums have 14 bits
