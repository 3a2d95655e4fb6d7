"""Quantised weights as checkpoints store them, packed into panels of the same codes, without a second rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moestro.ops.fp8 import SQUARE, Block, Scale, quantize_fp8, spread_scales

CodeFormat = Literal["fp8", "int4"]
INT4_ZERO = 8  # added to a code of 4 bits so that it is stored without a sign


@dataclass(frozen=True)
class Codes:
    """Rows of a matrix [M, K] as codes, with a scale for every block of them: value = code · scale.

    fp8    codes [M, K] float8_e4m3fn, scales [⌈M / block[0]⌉, ⌈K / block[1]⌉] fp32
    int4   codes [M, K] uint8, 8 + code, which is −8 … 7; scales as above, bf16 or fp32

    A scale for each row has block (1, K); one for the whole matrix has block (M, K).
    """

    format: CodeFormat
    codes: Tensor
    scales: Tensor
    block: Block

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code · scale [M, K], multiplied in fp32 and rounded once to `dtype`."""
        codes = self.codes.float() if self.format == "fp8" else self.codes.float() - INT4_ZERO
        return (codes * spread_scales(self.scales.float(), self.codes.shape, self.block)).to(dtype)


def quantize_codes(weight: Tensor, scale: Scale = "fp32") -> Codes:
    """weight [M, K] -> fp8 codes in blocks of 128 × 128."""
    return Codes("fp8", *quantize_fp8(weight, SQUARE, scale), SQUARE)
