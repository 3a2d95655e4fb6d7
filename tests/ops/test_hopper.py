"""Hopper's accumulator against the same rules written with Python's integers and fractions, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moestro.ops.hopper import block_products, whole_products

NAN = 0x7F


def decode(code: int) -> tuple[Fraction, int]:
    """Significand and exponent of an E4M3 byte, from its bits."""
    sign, exponent, fraction = -1 if code & 0x80 else 1, code >> 3 & 15, Fraction(code & 7, 8)
    return (sign * fraction, -6) if exponent == 0 else (sign * (1 + fraction), exponent - 7)


def cut(x: Fraction, unit: Fraction) -> Fraction:
    """x in whole units, rounded towards zero."""
    return math.trunc(x / unit) * unit


def exponent_of(x: Fraction) -> int:
    """The exponent of the leading bit."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if abs(x) >= Fraction(2) ** exponent else exponent - 1


def accumulate(a: list[int], b: list[int]) -> float:
    """All of K in one accumulator, 32 products at a time."""
    total = Fraction(0)
    if any(code & 0x7F == NAN for code in (*a, *b)):
        return math.nan
    for first in range(0, len(a), 32):
        terms = [(total, exponent_of(total))] if total else []
        for left, right in zip(a[first : first + 32], b[first : first + 32], strict=True):
            (x, i), (y, j) = decode(left), decode(right)
            if x * y:
                terms.append((x * y * Fraction(2) ** (i + j), i + j))
        if terms:
            unit = Fraction(2) ** (max(exponent for _, exponent in terms) - 13)
            total = sum((cut(value, unit) for value, _ in terms), Fraction(0))
            total = cut(total, Fraction(2) ** (exponent_of(total) - 13)) if total else total
    return float(total)


def values(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def same_bits(found: Tensor, expected: Tensor) -> bool:
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(
        found[~nan].view(torch.int32), expected[~nan].view(torch.int32)
    )


def random_codes(kind: str, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator)
    if kind == "any":  # every code but NaN
        codes = torch.where(codes & 0x7F == NAN, 0x38, codes)
    elif kind == "subnormal":
        codes = codes & 0x87
    elif kind == "narrow":  # exponents that differ by little, as after scaling
        codes = (codes & 0x9F) | 0x50
    elif kind == "positive":
        codes = torch.where(codes & 0x7F == NAN, 0x38, codes) & 0x7F
    elif kind == "sparse":
        codes = torch.where(torch.rand(shape, generator=generator) < 0.9, codes & 0x80, codes & 0xF7)
    elif kind == "nan":
        codes = torch.where((codes & 0x7F == NAN) & (torch.rand(shape, generator=generator) < 0.9), 0x80, codes)
    return codes.to(torch.uint8)


@pytest.mark.parametrize("kind", ["any", "subnormal", "narrow", "positive", "sparse", "nan"])
@pytest.mark.parametrize(("inner", "promote"), [(32, 32), (256, 128), (512, 512)])
def test_accumulators_are_those_of_whole_numbers(kind: str, inner: int, promote: int) -> None:
    a, b = random_codes(kind, 7, inner, seed=1), random_codes(kind, 9, inner, seed=2)
    found = block_products(values(a), values(b), promote)
    expected = [
        [[accumulate(x[k : k + promote], y[k : k + promote]) for y in b.tolist()] for x in a.tolist()]
        for k in range(0, inner, promote)
    ]
    assert found.shape == (inner // promote, 7, 9)
    assert same_bits(found, torch.tensor(expected, dtype=torch.float32))


def test_a_long_sum_and_every_pair_of_codes() -> None:
    a, b = random_codes("any", 2, 8192, seed=3), random_codes("any", 2, 8192, seed=4)
    expected = torch.tensor([[accumulate(x, y) for y in b.tolist()] for x in a.tolist()])
    assert same_bits(whole_products(values(a), values(b)), expected)
    codes = torch.arange(256, dtype=torch.uint8)
    single = whole_products(values(codes)[:, None], values(codes)[:, None])  # K = 1 is filled up with zeros
    assert same_bits(single, values(codes)[:, None] * values(codes) + 0.0)


def test_values_that_cancel_leave_what_alignment_kept() -> None:
    a = torch.zeros(1, 64)
    a[0, :3] = torch.tensor([448.0, -448.0, 1.0])
    b = torch.ones(1, 64)
    assert whole_products(a, b).item() == 1.0  # 448 has exponent 8: the unit is 2⁻⁵
    a[0, 2] = 2**-5 * 0.875
    assert whole_products(a, b).item() == 0.0  # below the unit
    a[0, 2], a[0, 40] = 0.0, 2**-5 * 0.875
    assert whole_products(a, b).item() == 2**-5 * 0.875  # in the next instruction, with nothing larger in it
    a[0, :2] = torch.tensor([-(2.0**-9), 2.0**-9])
    a[0, 40] = 0.0
    assert whole_products(a, b).view(torch.int32).item() == 0  # +0


def test_products_are_not_normalised() -> None:
    a, b = torch.zeros(1, 32), torch.zeros(1, 32)
    a[0, 0], b[0, 0] = 1.875, 1.875  # 3.515625: exponent 0, so that the unit is 2⁻¹³ and not 2⁻¹²
    a[0, 1], b[0, 1] = 2**-6, 2**-7  # 2⁻¹³
    a[0, 2], b[0, 2] = -1.875, 1.875
    assert whole_products(a, b).item() == 2**-13


def test_the_result_is_cut_to_fourteen_bits() -> None:
    ones = torch.ones(1, 32)
    a = torch.full((1, 32), 256.0)
    a[0, 0] = 256 + 32
    assert whole_products(a, ones).item() == 8192 + 32
    a[0, 1] = 0.75  # 7968.75 + 32 has 15 bits at its exponent; 0.75 goes down towards zero
    assert whole_products(a, ones).item() == 7968.5
    assert whole_products(-a, ones).item() == -7968.5


def test_error_grows_with_the_length_unless_sums_are_promoted() -> None:
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, list[float]] = {"whole": [], "promoted": []}
    for inner in (512, 2048, 8192):
        a, b = (torch.rand(8, inner, generator=generator).mul(448).to(torch.float8_e4m3fn).float() for _ in range(2))
        exact = a.double() @ b.double().T
        found = {"whole": whole_products(a, b), "promoted": block_products(a, b).double().sum(0)}
        for name, product in found.items():
            errors[name].append(float(((product - exact) / exact).abs().max()))
    assert errors["whole"][0] * 4 < errors["whole"][1] * 2 < errors["whole"][2]
    assert max(errors["promoted"]) < 2 * min(errors["promoted"]) < errors["whole"][0]


@pytest.mark.parametrize(("inner", "promote"), [(64, 48), (96, 64), (64, 0)])
def test_shapes_that_do_not_fit_are_refused(inner: int, promote: int) -> None:
    with pytest.raises(ValueError, match=f"after {promote} values"):
        block_products(torch.zeros(2, inner), torch.zeros(3, inner), promote)
    with pytest.raises(ValueError, match=r"\[2, 64\] and \[3, 32\]"):
        block_products(torch.zeros(2, 64), torch.zeros(3, 32), 32)


def test_tiles_do_not_show() -> None:
    a, b = values(random_codes("any", 130, 64, seed=5)), values(random_codes("any", 70, 64, seed=6))
    alone = torch.cat([whole_products(row[None], b) for row in a[[0, 63, 64, 129]]])
    assert torch.equal(whole_products(a, b)[[0, 63, 64, 129]], alone)
