"""The sum of products that Hopper's FP8 tensor cores compute, to the bit, in plain torch on any machine.

Source: MMA-Sim (arXiv 2511.10909), whose model of WGMMA agrees with the hardware on more than a million cases. One
instruction adds 32 products of E4M3 codes to an accumulator:

    1. a product is significand · significand, which is below 4, with the sum of the exponents. It is exact, and not
       normalised. A subnormal code has exponent −6 and a significand below 1.
    2. products and accumulator are aligned to the largest exponent among those that are not zero, and each is cut,
       towards zero, to 13 bits after the point
    3. the sum of what is left is exact; it is cut, towards zero, to 1 + 13 significant bits: the new accumulator

A long sum therefore loses the more of each product the larger it has grown. DeepSeek-V3 (§3.3.2) takes the accumulator
out after every 128 values, four instructions, adds it to a sum in fp32 and starts again from 0. A NaN gives NaN (its
bits are not modelled), a sum of nothing +0.

All of this is exact in fp32: a term has at most 2 + 13 bits, a sum of 33 at most 21.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 32  # products that one instruction adds
PROMOTE = 128  # values between promotions in DeepSeek-V3
FRACTION = 13  # bits after the point that terms and sums keep
LEAST_POWER = 2.0**-6  # of a code; also the power of subnormal ones
TILE_ROWS, TILE_COLUMNS = 64, 64  # of sums computed together: temporary tensors stay in the cache


@torch.no_grad()
def block_products(a: Tensor, b: Tensor, promote: int = PROMOTE) -> Tensor:
    """Accumulators after every `promote` values of K, each started at 0: [K / promote, M, N] fp32.

    a [M, K] and b [N, K] hold the values of E4M3 codes in fp32, without scales. K is a multiple of `promote`, which is
    a multiple of 32; zeros may fill it up. ValueError otherwise.
    """
    if promote <= 0 or promote % STEP or a.shape[1] % promote or a.shape[1] != b.shape[1]:
        raise ValueError(f"promotion after {promote} values in products of {list(a.shape)} and {list(b.shape)}")
    out = a.new_empty(a.shape[1] // promote, len(a), len(b))
    for stretch in range(len(out)):
        within = slice(stretch * promote, (stretch + 1) * promote)
        left, right = a[:, within].T.contiguous(), b[:, within].T.contiguous()  # [promote, M], [promote, N]
        powers = _powers(left), _powers(right)
        for row in range(0, len(a), TILE_ROWS):
            rows = slice(row, row + TILE_ROWS)
            for column in range(0, len(b), TILE_COLUMNS):
                columns = slice(column, column + TILE_COLUMNS)
                out[stretch, rows, columns] = _accumulate(
                    left[:, rows, None], right[:, None, columns], powers[0][:, rows, None], powers[1][:, None, columns]
                )
    return out


def whole_products(a: Tensor, b: Tensor) -> Tensor:
    """The products without promotion: the accumulator after all of K, [M, N] fp32. a [M, K], b [N, K] as above."""
    padding = (0, -a.shape[1] % STEP)
    a, b = torch.nn.functional.pad(a, padding), torch.nn.functional.pad(b, padding)
    return block_products(a, b, a.shape[1])[0]


def _accumulate(a: Tensor, b: Tensor, a_powers: Tensor, b_powers: Tensor) -> Tensor:
    """[promote, m, 1] and [promote, 1, n], values and their powers of two -> accumulator [m, n]."""
    total = a.new_zeros(a.shape[1], b.shape[2])
    for first in range(0, len(a), STEP):
        step = slice(first, first + STEP)
        largest = torch.maximum((a_powers[step] * b_powers[step]).amax(0), _power(total))
        largest.clamp_(min=LEAST_POWER * LEAST_POWER)  # where all is 0; loses nothing, all values are multiples of 2⁻¹⁸
        scale = 2.0**FRACTION / largest
        terms = (a[step] * b[step]).mul_(scale).trunc_()
        exact = terms.sum(0).add_(total.mul_(scale).trunc_()).div_(scale)
        total = (exact.view(torch.int32) & ~((1 << (23 - FRACTION)) - 1)).view(torch.float32).add_(0.0)  # no −0
    return total


def _powers(codes: Tensor) -> Tensor:
    """2 to the exponent of each code; 0 for a zero, which takes no part in the alignment."""
    return torch.where(codes == 0, codes.new_zeros(()), _power(codes).clamp_(min=LEAST_POWER))


def _power(x: Tensor) -> Tensor:
    """The largest power of two that is not above |x|, of normal fp32 values; 0 for 0, infinity for NaN."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)
