"""Codes and scales against a search through all codes, scale by scale, in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from moestro import ops
from moestro.ops.fp8 import E4M3, Block, choose_scales, spread_scales

CODES = torch.arange(256, dtype=torch.uint8).view(E4M3)
VALUES = [(float(CODES[code]), code) for code in range(127)]  # 0 … 448 in order; an even code is an even last bit


def nearest(x: float) -> float:
    """The nearest value of a code, ties to the even code."""
    distances = [(abs(Fraction(abs(x)) - Fraction(value)), code % 2, value) for value, code in VALUES]
    return math.copysign(min(distances)[2], x)


def fp32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def brute_force(x: Tensor, block: Block, scale: str, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes as fp32, and scales, one block after another."""
    grid = [math.ceil(side / step) for side, step in zip(x.shape, block, strict=True)]
    codes, scales = torch.zeros(x.shape), torch.zeros(*grid)
    for i, j in product(range(grid[0]), range(grid[1])):
        at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        values = x[at].double().tolist()
        largest = max(fp32(least), max(abs(value) for row in values for value in row))
        one = fp32(largest / 448)
        if one < 2.0**-126:
            one = 1.0
        elif scale == "ue8m0":
            one = 2.0 ** math.ceil(math.log2(Fraction(one)))  # log2 of a power of two is exact
            one /= 2 if one / 2 >= fp32(largest / 448) else 1
        scales[i, j] = one
        codes[at] = torch.tensor([[nearest(fp32(value / one)) for value in row] for row in values])
    return codes, scales


def awkward() -> Tensor:
    """Ties, subnormal codes, zeros, blocks of all magnitudes."""
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    x[0] = torch.linspace(-448, 448, 40)
    x[1, :20] = torch.arange(20) / 32 + 448 / 512  # between codes
    x[1, 20:] = 448
    x[2] = torch.arange(40) * 2.0**-10  # halves of the least code, if the scale is 1
    x[2, 0] = 448
    x[3], x[4] = 0, -0.0
    x[5] *= 1e-37
    x[6] *= 1e37
    x[7] = 1e-42
    return x


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("block", [(1, 16), (4, 16), (9, 40), (16, 64), (8, 1)], ids=str)
def test_codes_and_scales_are_those_of_a_search(block: Block, scale: str) -> None:
    x = awkward()
    codes, scales = ops.quantize_fp8(x, block, scale)  # type: ignore[arg-type]
    expected, expected_scales = brute_force(x, block, scale)
    assert codes.dtype == E4M3 and codes.shape == x.shape and codes.is_contiguous()
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.float(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_widened_first(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = ops.quantize_fp8(x, (1, 16))
    expected, expected_scales = brute_force(x.float(), (1, 16), "fp32")
    assert torch.equal(codes.float(), expected) and torch.equal(scales, expected_scales)


def test_values_come_back_within_half_a_step() -> None:
    x = torch.randn(5, 6, 300, generator=torch.Generator().manual_seed(2))
    for block, scale in product([(1, 128), (128, 128), (2, 100)], ["fp32", "ue8m0"]):
        codes, scales = ops.quantize_fp8(x, block, scale)  # type: ignore[arg-type]
        assert scales.shape == (5, -(-6 // block[0]), -(-300 // block[1]))
        back = ops.dequantize_fp8(codes, scales, block)
        step = spread_scales(scales, x.shape, block) * 2.0**-9
        assert ((back - x).abs() <= torch.maximum(x.abs() * (1 / 16 + 1e-6), step / 2)).all()
        assert torch.equal(ops.dequantize_fp8(codes, scales, block, torch.bfloat16), back.bfloat16())


def test_a_block_with_a_value_that_is_not_finite_becomes_nan() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(2, 256)
        x[0, 5] = bad
        for scale in ("fp32", "ue8m0"):
            back = ops.dequantize_fp8(*ops.quantize_fp8(x, scale=scale))  # type: ignore[arg-type]
            assert back[0, :128].isnan().all() and torch.equal(back[0, 128:], x[0, 128:]) and torch.equal(back[1], x[1])


def test_a_floor_keeps_small_activations_small() -> None:
    x = torch.full((1, 16), 1e-6)
    codes, scales = ops.quantize_fp8(x, (1, 16), least=1e-4)
    expected, expected_scales = brute_force(x, (1, 16), "fp32", least=1e-4)
    assert torch.equal(codes.float(), expected) and torch.equal(scales, expected_scales)


def test_powers_of_two_are_found_in_the_bits() -> None:
    largest = torch.tensor([448.0, 448.0001, 447.9999, 896, 1, 3e38, 2.0**-117 * 1.75, 0])
    scales = choose_scales(largest, "ue8m0")
    assert scales.tolist() == [1, 2, 1, 2, 2.0**-8, 2.0**120, 2.0**-125, 1]
    assert choose_scales(torch.tensor([math.inf]), "ue8m0").isinf().all()


def test_what_does_not_fit_is_refused() -> None:
    codes, scales = ops.quantize_fp8(torch.ones(4, 200))
    with pytest.raises(ValueError, match="scales are fp32 or ue8m0, not 'fp16'"):
        ops.quantize_fp8(torch.ones(4, 200), scale="fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scales \[4, 2\] for values \[4, 200\] in blocks of 128 x 128"):
        ops.dequantize_fp8(codes, scales, (128, 128))
