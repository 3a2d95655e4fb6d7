"""Rows of an FP8 cache: bytes, in the layout of DeepSeek-V3.2's latent cache (FlashMLA).

    codes      the first `coded` values as E4M3, a byte each
    scales     fp32, one for every tile of 128 codes; the last tile may be shorter
    the rest   the other values in bf16: for MLA the rotated key, of which a code would keep too little

DeepSeek-V3 has 512 + 4 · 4 + 64 · 2 = 656 bytes per token and layer, where bf16 takes 1152. Codes and scales are those
of `quantize_fp8` with DeepSeek's floor. The rest is bf16 in fp32 models, too. A row is widened to code · scale, in fp32
and then rounded once to the type of the activations. The kernels are in csrc/serving/fp8_rows.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.fp8 import E4M3, LEAST_ACTIVATION, TILE, dequantize_fp8, quantize_fp8


def row_bytes(coded: int, width: int) -> int:
    """Bytes of a row of `width` values, the first `coded` of them codes."""
    return coded + 4 * -(-coded // TILE[1]) + 2 * (width - coded)


def pack_rows(x: Tensor, coded: int) -> Tensor:
    """x [N, W] -> uint8 [N, row_bytes(coded, W)]."""
    codes, scales = quantize_fp8(x[:, :coded], TILE, least=LEAST_ACTIVATION)
    parts = (codes, scales, x[:, coded:].bfloat16().contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], 1)


def unpack_rows(rows: Tensor, coded: int, width: int, dtype: torch.dtype) -> Tensor:
    """uint8 [N, row_bytes(coded, width)] -> values [N, width] of `dtype`."""
    codes, scales, rest = rows.split([coded, 4 * -(-coded // TILE[1]), 2 * (width - coded)], 1)
    values = dequantize_fp8(_read(codes, E4M3), _read(scales, torch.float32), TILE, dtype)
    return torch.cat([values, _read(rest, torch.bfloat16).to(dtype)], 1)


def store_rows(pages: Tensor, slots: Tensor, x: Tensor, coded: int) -> None:
    """Write x [N, W] to slots [N] int64, page · 64 + place, of pages [P, 64, row_bytes(coded, W)] uint8."""
    if not library.serves(x):
        pages.flatten(0, 1)[slots] = pack_rows(x, coded)
        return
    if not pages.is_contiguous() or slots.dtype != torch.int64 or len(slots) != len(x):
        raise ValueError("store_rows: pages must be contiguous, slots int64, one for each row")
    sizes = (len(x), len(pages), pages.shape[2], x.shape[1], coded, library.TYPES[x.dtype], torch.get_num_threads())
    library.call("moestro_store_fp8_rows", pages, x.contiguous(), slots.contiguous(), *sizes)


def _read(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [N, n] at any address, as numbers."""
    out = torch.empty(len(raw), raw.shape[1] // dtype.itemsize, dtype=dtype)
    out.view(torch.uint8).copy_(raw)
    return out
