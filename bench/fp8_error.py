"""What FP8 costs in accuracy: products accumulated in 14 bits, and values rounded to E4M3.

    python bench/fp8_error.py [--seeds 5] [--rows 32] [--columns 128]

First, errors of a product [M, K] x [N, K] against float64 on the same codes, so that only the accumulation differs:

    fp32       1 x 128 tiles by 128 x 128 blocks; sums of 128 and their total in fp32
    promoted   the same codes; sums of 128 as Hopper's tensor cores compute them, their total in fp32 (DeepSeek-V3)
    whole      one scale for a row, one for the weights; the tensor cores' accumulator keeps all of K

of three kinds of values:

    normal     N(0, 1); products cancel, so that a sum grows as √K
    positive   uniform in [0, 1); nothing cancels, and every cut goes the same way
    outliers   N(0, 1), one column of inputs in 100 times 100

`mean` is Σ|error| / Σ|exact|, `largest` the largest |error| over the root mean square of the exact results. (Error over
exact result of a single element has no bound: some results are near 0.) DeepSeek-V3 (§3.3.2) reports a largest relative
error near 2% at K = 4096 for "two random matrices", and says neither of what kind nor relative to what.

Second, errors of values N(0, 1) that are only rounded, where 4 columns of 4096 are outliers: Σ|error| / Σ|value| over
all other columns, and the share of all codes that became 0. Every figure is the mean over seeds with its 95% interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from statistics import fmean

import torch
from torch import Tensor

from moestro.compare.results import half_interval
from moestro.ops.fp8 import SQUARE, TILE, Block, dequantize_fp8, quantize_fp8, spread_scales
from moestro.ops.hopper import block_products, whole_products

LENGTHS = (512, 1024, 2048, 4096, 8192)
KINDS = ("normal", "positive", "outliers")
MEASURES = ("mean", "largest")
FACTORS = (1, 100, 10_000, 100_000)  # of the columns that are outliers
BLOCK = 128


def draw(kind: str, rows: int, inner: int, generator: torch.Generator) -> Tensor:
    """Values [rows, inner] of a kind."""
    if kind == "positive":
        return torch.rand(rows, inner, generator=generator)
    values = torch.randn(rows, inner, generator=generator)
    if kind == "outliers":
        values[:, ::100] *= 100
    return values


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """The measures of a product."""
    error = (found.double() - exact).abs()
    return {
        "mean": float(error.sum() / exact.abs().sum()),
        "largest": float(error.max() / exact.square().mean().sqrt()),
    }


def product_errors(x: Tensor, weight: Tensor) -> dict[str, dict[str, float]]:
    """Errors of x [M, K] times weight [N, K] for each way to add the products up."""
    a, b = quantize_fp8(x, TILE), quantize_fp8(weight, SQUARE)
    exact = (a[0].double() * spread_scales(a[1], a[0].shape, TILE)) @ (
        b[0].double() * spread_scales(b[1], b[0].shape, SQUARE)
    ).T
    codes = a[0].float(), b[0].float()
    scales = a[1].T[:, :, None] * b[1].T.repeat_interleave(BLOCK, -1)[:, None, : len(weight)]  # [K / 128, M, N]
    plain = torch.einsum("mkc,nkc->kmn", *(c.unflatten(1, (-1, BLOCK)) for c in codes))
    long = [quantize_fp8(x, (1, x.shape[1]))[0].float(), quantize_fp8(weight, (len(weight), x.shape[1]))[0].float()]
    return {
        "fp32": errors((plain * scales).sum(0), exact),
        "promoted": errors((block_products(*codes, BLOCK) * scales).sum(0), exact),
        "whole": errors(whole_products(*long), long[0].double() @ long[1].double().T),  # the scales cancel
    }


def measure_products(
    kind: str, inner: int, seeds: int, *, rows: int = 32, columns: int = 128
) -> list[dict[str, dict[str, float]]]:
    """`product_errors` of a kind of inputs and normal (or positive) weights, one entry for each seed."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        weight_kind = "positive" if kind == "positive" else "normal"
        x, weight = draw(kind, rows, inner, generator), draw(weight_kind, columns, inner, generator)
        found.append(product_errors(x, weight))
    return found


def formats(inner: int, rows: int) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Values -> (rounded values, which of them became 0)."""

    def block(size: Block) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def round_trip(x: Tensor) -> tuple[Tensor, Tensor]:
            codes, scales = quantize_fp8(x, size)
            return dequantize_fp8(codes, scales, size), codes.float() == 0

        return round_trip

    return {
        "bf16": lambda x: (x.bfloat16().float(), x.bfloat16() == 0),
        "fp8, 1 x 128": block(TILE),
        "fp8, 128 x 128": block(SQUARE),
        "fp8, a row": block((1, inner)),
        "fp8, whole": block((rows, inner)),
    }


def measure_rounding(
    factor: float, seeds: int, *, rows: int = 128, inner: int = 4096
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """(format, [(mean relative error of ordinary values, share of zero codes) of each seed])."""
    for name, round_trip in formats(inner, rows).items():
        found = []
        for seed in range(seeds):
            x = draw("normal", rows, inner, torch.Generator().manual_seed(seed))
            ordinary = torch.ones(inner, dtype=torch.bool)
            ordinary[:: inner // 4] = False
            x[:, ~ordinary] *= factor
            rounded, zero = round_trip(x)
            error = (rounded - x)[:, ordinary].abs().sum() / x[:, ordinary].abs().sum()
            found.append((float(error), float(zero.float().mean())))
        yield name, found


def describe(values: list[float]) -> str:
    """Mean and half the interval, in per cent, with two digits of what differs."""
    half = half_interval(values)
    return f"{100 * fmean(values):.3g}%" + (f" ± {100 * half:.1g}" if half is not None else "")


def main() -> None:
    """Read the command line, measure, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--columns", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors are small
    print(f"{'values':<9} {'K':>5}  {'sum':<9}" + "".join(f"{name:>20}" for name in MEASURES))
    for kind in KINDS:
        for inner in LENGTHS:
            found = measure_products(kind, inner, options.seeds, rows=options.rows, columns=options.columns)
            for way in found[0]:
                cells = [describe([seed[way][name] for seed in found]) for name in MEASURES]
                print(f"{kind:<9} {inner:>5}  {way:<9}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    print(f"\n{'outliers':<10} {'format':<16}{'error':>20}{'codes that are 0':>22}")
    for factor in FACTORS:
        for name, pairs in measure_rounding(factor, options.seeds):
            error, zeros = (describe([pair[i] for pair in pairs]) for i in (0, 1))
            print(f"{f'x {factor}':<10} {name:<16}{error:>20}{zeros:>22}", flush=True)


if __name__ == "__main__":
    main()
