"""FP8 with a scale for every block of values, as DeepSeek-V3 stores weights and computes with activations (V3 §3.3).

A code is one byte, E4M3 (1 sign, 4 exponent and 3 fraction bits; largest 448, least 2⁻⁹, no infinity; 0x7F and 0xFF are
NaN). A value is code · scale. Weights have a scale for every 128 × 128 values, activations and gradients for every
1 × 128. Blocks at the edges are smaller where 128 does not divide a side, as in DeepSeek's 576-row matrices.

The order of operations is that of DeepSeek's `act_quant` (inference/kernel.py of V3): scale = amax / 448, code =
round(x / scale), both divisions in fp32, x never rounded to bf16 first. Its floor under amax is the argument `least`:
gradients would be lost below DeepSeek's 1e-4. DeepGEMM multiplies by 1 / scale instead, which changes the last bit of
some ties. Casts round to nearest, ties to even; nothing exceeds 448 after the division, so nothing is clamped. A block
of zeros, or of magnitudes too small for a normal scale, has scale 1 and codes 0. A block with an infinity or a NaN
becomes NaN.

    fp32     scale = amax / 448
    ue8m0    the least power of two that is not below it (V3.1), found in the exponent's bits, never by a logarithm
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = Literal["fp32", "ue8m0"]
Block = tuple[int, int]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TILE: Block = (1, 128)  # of activations and gradients
SQUARE: Block = (128, 128)  # of weights
LEAST_ACTIVATION = 1e-4  # DeepSeek's floor under amax in inference
LEAST_NORMAL = torch.finfo(torch.float32).tiny


def quantize_fp8(x: Tensor, block: Block = TILE, scale: Scale = "fp32", *, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """x [..., M, K] of any float type -> codes [..., M, K] float8_e4m3fn, scales [..., ⌈M/b₀⌉, ⌈K/b₁⌉] fp32.

    `least` is a floor under the largest magnitude of a block. ValueError for an unknown `scale`.
    """
    blocks = _blocks(x.float(), block)  # [..., M', b₀, K', b₁]
    scales = choose_scales(blocks.abs().amax((-3, -1)), scale, least)
    codes = (blocks / scales[..., :, None, :, None]).to(E4M3)
    return codes.flatten(-4, -3).flatten(-2)[..., : x.shape[-2], : x.shape[-1]].contiguous(), scales


def dequantize_fp8(codes: Tensor, scales: Tensor, block: Block = TILE, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize_fp8`: code · scale in fp32, rounded once to `dtype`. ValueError if the shapes differ."""
    return (codes.float() * spread_scales(scales, codes.shape, block)).to(dtype)


def choose_scales(largest: Tensor, scale: Scale, least: float = 0.0) -> Tensor:
    """Scales of blocks from their largest magnitudes, fp32 of any shape."""
    scales = largest.clamp(min=least) / LARGEST  # keeps NaN
    scales = torch.where(scales < LEAST_NORMAL, 1.0, scales)
    if scale == "fp32":
        return scales
    if scale != "ue8m0":
        raise ValueError(f"scales are fp32 or ue8m0, not {scale!r}")
    return round_scales(scales)


def round_scales(scales: Tensor) -> Tensor:
    """Normal fp32 numbers, rounded up to powers of two; infinities and NaNs stay."""
    bits = scales.view(torch.int32)
    up = ((bits & 0x7FFFFF) != 0).int() << 23  # to the next power of two
    return torch.where(scales < torch.inf, ((bits + up) & -0x800000).view(torch.float32), scales)


def spread_scales(scales: Tensor, shape: torch.Size, block: Block = TILE) -> Tensor:
    """Scales [..., ⌈M/b₀⌉, ⌈K/b₁⌉] -> the scale of every value, [..., M, K]. ValueError if they do not fit `shape`."""
    rows, columns = shape[-2:]
    if scales.shape != (*shape[:-2], -(-rows // block[0]), -(-columns // block[1])):
        raise ValueError(f"scales {list(scales.shape)} for values {list(shape)} in blocks of {block[0]} x {block[1]}")
    whole = scales.repeat_interleave(block[0], -2) if block[0] > 1 else scales
    return whole.repeat_interleave(block[1], -1)[..., :rows, :columns]


def _blocks(x: Tensor, block: Block) -> Tensor:
    """x [..., M, K], padded with zeros -> [..., M', b₀, K', b₁]."""
    padded = F.pad(x, (0, -x.shape[-1] % block[1], 0, -x.shape[-2] % block[0]))
    return padded.unflatten(-2, (-1, block[0])).unflatten(-1, (-1, block[1]))
