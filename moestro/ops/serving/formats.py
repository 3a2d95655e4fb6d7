"""Weights as the serving kernels read them: panels of 64 outputs, kept as fp32, bf16, int8 or int4.

A matrix [M, K] becomes ⌈M / 64⌉ consecutive panels of equal size, padded with zeros where M and K do not fill them. A
panel is a row of blocks along k, so it is read once from front to end. The same bytes serve every instruction set:

    format  k per block   bytes  bits a weight  what a block holds
    fp32               1    256             32  float [64]
    bf16               2    256             16  bf16 [64][2]: the two k of an output side by side
    int8              64   4224           8.25  uint8 [16][64][4], 128 + code, k = 4 i + j; then bf16 scale [64]
    int4              32   1152            4.5  nibbles [4][64][4], 8 + code, k = 4 i + j in the low and 16 + 4 i + j in
                                                the high half of a byte; then bf16 scale [64]
    fp8              128   8448           8.25  E4M3 codes [32][16][2][4][2], k = 4 i + 2 j + l of output 4 g + h at
                                                [i][g][j][h][l]; then fp32 scale [64]

`FORMATS` is this table as data: the packer, the packed directory and the kernels' codes come from it.

fp8 has a scale for each output and 128 k, so it takes block scales as well as scales of rows or of whole matrices,
and a panel may lie across blocks. Codes and scales of a checkpoint are kept bit for bit (`pack_codes`). Other matrices
are quantised in blocks of 128 × 128. Rows of activations are not quantised, unless a product asks for it.

value = scale · code. int8: scale = largest magnitude / 127. int4: the largest magnitude is code −8 and its sign goes
into the scale, as in llama.cpp's Q4_0; then the scale is refitted to these codes, Σ w·code / Σ code². For products with
such weights, rows of activations are quantised to 8 bits in blocks of the same length: code = x · (127 / largest
magnitude), rounded to even.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops import library
from moestro.ops.abi import KINDS
from moestro.ops.fp8 import E4M3, SQUARE, spread_scales
from moestro.ops.serving.codes import Codes, quantize_codes

PANEL = 64
LEAST_SCALE = 1e-37  # its inverse is finite; blocks of smaller values become zeros
LARGE = 1 << 21  # bytes
CHUNK = 1 << 20  # elements of a `RowSource` packed at a time, because they are copied
PLAIN_CHUNK = 1 << 18  # elements packed at a time in plain torch, which needs several times their memory


@dataclass(frozen=True)
class WeightFormat:
    """How a block of a panel is stored: values of `bits` bits for `length` k of 64 outputs, then their scales.

    `code` is the format's number in the C interface and in saved sizes. `scale` is the dtype of the scales, one per
    output, which end the block; None if there are none. `quantises_rows`: products quantise the rows of activations,
    too, in blocks of `length`.
    """

    name: str
    code: int
    length: int
    bits: int
    scale: torch.dtype | None = None
    quantises_rows: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the values are codes and scales."""
        return self.scale is not None

    @property
    def offset(self) -> int:
        """Added to an integer code so that it is stored without a sign."""
        return 1 << (self.bits - 1)

    @property
    def scale_offset(self) -> int:
        """Bytes of a block's values; its scales begin after them."""
        return PANEL * self.length * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a block."""
        return PANEL * self.scale.itemsize if self.scale else 0

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.scale_offset + self.scale_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, including its share of the scales."""
        return 8 * self.nbytes / (PANEL * self.length)


FORMATS = {
    one.name: one
    for one in (
        WeightFormat("fp32", KINDS["fp32"], length=1, bits=32),
        WeightFormat("bf16", KINDS["bf16"], length=2, bits=16),
        WeightFormat("int8", KINDS["int8"], length=64, bits=8, scale=torch.bfloat16, quantises_rows=True),
        WeightFormat("int4", KINDS["int4"], length=32, bits=4, scale=torch.bfloat16, quantises_rows=True),
        WeightFormat("fp8", KINDS["fp8"], length=128, bits=8, scale=torch.float32),
    )
}


def plain_format(dtype: torch.dtype) -> str:
    """The format that keeps weights in the type they are computed with."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


class RowSource:
    """Matrices [m, K] stacked as one [M, K], read in `dtype` a few rows at a time.

    They may be in mapped files: only the requested rows are copied.
    """

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._parts, self._dtype = parts, dtype
        self.shape = (sum(len(part) for part in parts), parts[0].shape[1])

    def __getitem__(self, rows: slice) -> Tensor:
        found, first, last = [], *rows.indices(self.shape[0])[:2]
        for part in self._parts:
            found.append(part[max(first, 0) : max(last, 0)])
            first, last = first - len(part), last - len(part)
        return torch.cat([rows.to(self._dtype) for rows in found])


def panel_shape(rows: int, columns: int, format: str) -> tuple[int, int]:
    """(panels, bytes of a panel) for a matrix [rows, columns]."""
    spec = FORMATS[format]
    return -(-rows // PANEL), -(-columns // spec.length) * spec.nbytes


def new_panels(shape: Sequence[int]) -> Tensor:
    """uint8 memory of a shape, in large pages if Linux grants them: reading it is up to a quarter faster."""
    out = torch.empty(tuple(shape), dtype=torch.uint8)
    if sys.platform == "linux" and out.nbytes >= LARGE:
        first = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (out.data_ptr() + out.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(first, length, mmap.MADV_HUGEPAGE)  # only a hint: a refusal changes nothing
    return out


def pack_panels(weight: Tensor | RowSource, format: str, out: Tensor | None = None) -> Tensor:
    """weight [M, K] fp32 or bf16 -> uint8 [panels, bytes of a panel], in contiguous `out` if it is given.

    Uses the kernels if they can run; the result is the same to the bit. ValueError if `out` is of another size.
    """
    rows, columns = weight.shape
    out = _room(rows, columns, format, out)
    if format == "fp8":
        return _quantize_panels(weight, out)
    is_native = library.serves(weight[:0])
    chunk = PLAIN_CHUNK if not is_native else CHUNK if isinstance(weight, RowSource) else rows * columns
    step = PANEL * max(1, -(-chunk // (PANEL * max(columns, 1))))
    for first in range(0, rows if columns else 0, step):
        part = weight[first : first + step]
        panels = out[first // PANEL : -(-(first + len(part)) // PANEL)]
        if is_native:
            part = part.contiguous()
            sizes = (*part.shape, FORMATS[format].code, library.TYPES[part.dtype], torch.get_num_threads())
            library.call("moestro_pack", panels, part, *sizes)
        else:
            filled = F.pad(part, (0, -columns % FORMATS[format].length, 0, -len(part) % PANEL))
            panels.copy_(_pack(filled.unflatten(0, (-1, PANEL)), format))
    return out


def pack_codes(parts: Sequence[Codes], out: Tensor | None = None) -> Tensor:
    """The rows of several matrices of codes of one format, one below the other -> panels as from `pack_panels`.

    ValueError if their scales do not fit the blocks of the format.
    """
    return pack_rows(*join_codes(parts), parts[0].format, out)


def join_codes(parts: Sequence[Codes]) -> tuple[Tensor, Tensor]:
    """Codes uint8 [M, K] and scales fp32 [M, blocks] of matrices one below the other, as `pack_rows` takes them."""
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
    return codes, torch.cat([row_scales(part) for part in parts])


def row_scales(part: Codes) -> Tensor:
    """Scales [M, blocks of the format along k], fp32, one for every row. ValueError if they do not fit its blocks."""
    (rows, columns), length = part.codes.shape, FORMATS[part.format].length
    if part.block[1] % length and part.block[1] < columns:
        raise ValueError(f"a scale for every {part.block[1]} values; {part.format} has one for every {length}")
    blocks = torch.Size((rows, -(-columns // length)))
    return spread_scales(part.scales.float(), blocks, (part.block[0], -(-part.block[1] // length)))


def pack_rows(codes: Tensor, scales: Tensor, format: str, out: Tensor | None = None) -> Tensor:
    """codes uint8 [M, K] as in `Codes`, scales fp32 [M, blocks] -> uint8 [panels, bytes of a panel].

    ValueError if `out` is of another size.
    """
    (rows, columns), length = codes.shape, FORMATS[format].length
    out = _room(rows, columns, format, out)
    if format == "fp8" and library.serves(scales[:0]):
        sizes = (rows, columns, torch.get_num_threads())
        library.call("moestro_pack_codes", out, codes.contiguous(), scales.contiguous(), *sizes)
        return out
    empty = 0 if format == "fp8" else FORMATS[format].offset  # the code of zero
    filled = F.pad(codes, (0, -columns % length, 0, -rows % PANEL), value=empty).unflatten(0, (-1, PANEL))
    of_panels = F.pad(scales, (0, 0, 0, -rows % PANEL)).unflatten(0, (-1, PANEL))
    return out.copy_(_join(filled, of_panels, format))


def _room(rows: int, columns: int, format: str, out: Tensor | None) -> Tensor:
    """Memory for the panels of a matrix: `out`, if it is given and fits."""
    shape = panel_shape(rows, columns, format)
    if out is not None and out.shape != shape:
        raise ValueError(f"{list(out.shape)} bytes are not the {format} panels of {rows} x {columns}")
    return new_panels(shape) if out is None else out


def _quantize_panels(weight: Tensor | RowSource, out: Tensor) -> Tensor:
    """Quantise a matrix in blocks of 128 × 128 into fp8 panels."""
    rows, columns = weight.shape
    step = SQUARE[0] * max(1, PLAIN_CHUNK // max(1, SQUARE[0] * columns))
    for first in range(0, rows if columns else 0, step):
        part = quantize_codes(weight[first : first + step])
        pack_codes([part], out[first // PANEL : -(-(first + len(part.codes)) // PANEL)])
    return out


def unpack_panels(panels: Tensor, format: str) -> Tensor:
    """uint8 [..., bytes of a panel] -> their values, fp32 [..., K, 64], K padded with zeros to whole blocks."""
    spec = FORMATS[format]
    blocks = panels.unflatten(-1, (-1, spec.nbytes))  # [..., B, bytes]
    codes, scales = blocks.split([spec.scale_offset, spec.scale_bytes], -1)
    match format:
        case "fp32":
            return blocks.contiguous().view(torch.float32)
        case "bf16":
            pairs = blocks.contiguous().view(torch.bfloat16).unflatten(-1, (PANEL, 2)).float()
            return pairs.transpose(-1, -2).flatten(-3, -2)
        case "int8":
            pass
        case "int4":
            codes = torch.cat([codes & 15, codes >> 4], -1)
        case "fp8":
            steps = (
                codes.contiguous().view(E4M3).float().unflatten(-1, (-1, PANEL // 4, 2, 4, 2))
            )  # [..., i, g, j, h, l]
            turned = steps.movedim((-3, -1), (-4, -3))  # [..., i, j, l, g, h]
            values = turned.flatten(-2).flatten(-4, -2)
            return (values * scales.contiguous().view(spec.scale).unsqueeze(-2)).flatten(-3, -2)
        case _:
            raise _unknown(format)
    values = codes.unflatten(-1, (spec.length // 4, PANEL, 4)).float() - spec.offset
    values = values.transpose(-1, -2).flatten(-3, -2)  # [..., B, length, 64]
    return (values * scales.contiguous().view(spec.scale).float().unsqueeze(-2)).flatten(-3, -2)


def quantize(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """weight [..., K], K in whole blocks -> codes [..., K] as fp32 (−127 … 127 or −8 … 7), scales [..., B] bf16."""
    blocks = weight.float().unflatten(-1, (-1, FORMATS[format].length))
    match format:
        case "int8":
            scale = (blocks.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
            codes = _scaled(blocks, scale).round_().clamp_(-127, 127)
            return codes.flatten(-2), scale.squeeze(-1).bfloat16()
        case "int4":
            low, high = blocks.aminmax(dim=-1, keepdim=True)
            scale = torch.where(-low > high, low, high) / -8
            scaled = _scaled(blocks, scale)
            codes = scaled.round().clamp_(-8, 7)
            fit = (scaled * codes).sum(-1, dtype=torch.float64).float()  # sums are exact
            fit /= codes.square().sum(-1).clamp(min=1)
            return codes.flatten(-2), (scale.squeeze(-1) * fit + 0.0).bfloat16()  # no −0
    raise _unknown(format)


def round_rows(x: Tensor, format: str) -> Tensor:
    """x [N, K] fp32, K in whole blocks -> the values [N, K] that rows keep in products with quantised weights."""
    blocks = x.unflatten(-1, (-1, FORMATS[format].length))
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 1e-30, largest / 127, 0)
    inverse = torch.tensor(127.0) / largest  # 127 / largest would be 127 · (1 / largest), rounded twice
    codes = torch.where(largest > 1e-30, blocks * inverse, 0).round()
    return torch.where(largest < torch.inf, codes * scale, torch.nan).flatten(-2)


def _scaled(blocks: Tensor, scale: Tensor) -> Tensor:
    return blocks * torch.where(scale.abs() > LEAST_SCALE, 1 / scale, 0)


def _pack(panels: Tensor, format: str) -> Tensor:
    """panels [p, 64, K], K in whole blocks -> uint8 [p, bytes of a panel]."""
    match format:
        case "fp32":
            return panels.float().transpose(1, 2).contiguous().view(torch.uint8).flatten(1)
        case "bf16":
            return _turn(panels.bfloat16().contiguous()).flatten(1)
    codes, scales = quantize(panels, format)
    return _join((codes + FORMATS[format].offset).to(torch.uint8), scales, format)


def _join(codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """codes uint8 [p, 64, K], K in whole blocks, and scales [p, 64, B] -> uint8 [p, bytes of a panel]."""
    spec = FORMATS[format]
    assert spec.scale is not None
    if format == "fp8":
        steps = codes.unflatten(-1, (-1, 2, 2)).unflatten(1, (-1, 4))  # [p, g, h, i, j, l]
        turned = steps.permute(0, 3, 1, 4, 2, 5).flatten(1)
    else:
        if spec.bits == 4:
            low, high = codes.unflatten(-1, (-1, 2, spec.length // 2)).unbind(-2)
            codes = (low | high << 4).flatten(-2)
        turned = _turn(codes.contiguous()).flatten(1)
    by_block = turned.unflatten(1, (scales.shape[-1], -1))  # [p, B, bytes of codes]
    return torch.cat([by_block, scales.to(spec.scale).transpose(1, 2).contiguous().view(torch.uint8)], -1).flatten(1)


def _unknown(format: str) -> ValueError:
    return ValueError(f"nothing here packs, unpacks or quantises {format}")


def _turn(values: Tensor) -> Tensor:
    """values [p, 64, K] of any type -> their bytes [p, K / 4 bytes, 64, 4]."""
    return values.view(torch.int32).transpose(1, 2).contiguous().view(torch.uint8).unflatten(-1, (PANEL, 4))
