"""Packed layouts, read back value by value as the documentation says, and what quantising costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moestro.ops import abi, library
from moestro.ops.serving import formats
from moestro.ops.serving.codes import Codes
from moestro.ops.serving.weights import PackedLinear

ROOT = Path(__file__).parents[3]
FORMATS = list(formats.FORMATS)
SIZES = {"fp32": (1, 256), "bf16": (2, 256), "int8": (64, 4224), "int4": (32, 1152), "fp8": (128, 8448)}
SHAPES = [(1, 1), (64, 64), (65, 33), (130, 129), (3, 0), (0, 5)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bf16(low: int, high: int) -> float:
    return float(torch.tensor([low, high], dtype=torch.uint8).view(torch.bfloat16))


def read(panels: Tensor, format: str, m: int, k: int) -> float:
    """W[m, k] from the bytes, by the table in `formats.py`."""
    length, size = SIZES[format]
    block = panels[m // 64].tolist()[k // length * size :][:size]
    m, k = m % 64, k % length
    if format == "fp32":
        return float(torch.tensor(block[4 * m : 4 * m + 4], dtype=torch.uint8).view(torch.float32))
    if format == "bf16":
        return bf16(*block[4 * m + 2 * k : 4 * m + 2 * k + 2])
    if format == "fp8":
        bits = torch.tensor(block, dtype=torch.uint8)
        code = bits[k // 4 * 256 + m // 4 * 16 + k // 2 % 2 * 8 + m % 4 * 2 + k % 2].view(torch.float8_e4m3fn)
        return float(code.float() * bits[8192 + 4 * m : 8196 + 4 * m].view(torch.float32))
    codes = size - 128
    scale = bf16(*block[codes + 2 * m : codes + 2 * m + 2])
    if format == "int8":
        return scale * (block[k // 4 * 256 + 4 * m + k % 4] - 128)
    byte = block[k % 16 // 4 * 256 + 4 * m + k % 4]
    return scale * ((byte >> 4 if k >= 16 else byte & 15) - 8)


def test_the_tables_of_the_documentation_are_the_table_of_the_code() -> None:
    code = {one.name: (one.length, one.nbytes, one.bits_per_weight) for one in formats.FORMATS.values()}
    written = [line.split() for line in (formats.__doc__ or "").splitlines()]
    pages = [line.strip("| ").split("|") for line in (ROOT / "docs" / "kernels.md").read_text("utf-8").splitlines()]
    for rows in (written, pages):
        cells = [[cell.strip() for cell in row[:4]] for row in rows if row and row[0].strip() in code]
        assert {name: (int(k), int(size), float(bits)) for name, k, size, bits in cells if k.isdigit()} == code


def test_the_numbers_of_formats_are_those_of_the_kernels() -> None:
    products = {"fp8_both"}  # no formats: the panels of fp8 by rows in fp8
    assert {one.name: one.code for one in formats.FORMATS.values()} == {
        name: code for name, code in abi.KINDS.items() if name not in products
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_lie_where_the_table_says(format: str, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    panels = formats.pack_panels(weight, format)
    assert tuple(panels.shape) == formats.panel_shape(*shape, format)
    values = formats.unpack_panels(panels, format).transpose(1, 2).flatten(0, 1)
    bound = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.005, "int4": 0.15, "fp8": 0.036}[
        format
    ]  # of the largest magnitude in its block
    if weight.numel():
        largest = float(weight.abs().max())
        assert float((values[: shape[0], : shape[1]] - weight).abs().max()) <= bound * largest
    for m in range(0, shape[0], 7):
        for k in range(0, shape[1], 5):
            assert read(panels, format, m, k) == values[m, k]
    assert not values[shape[0] :].any() and not values[:, shape[1] :].any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_packing_is_plain_packing(
    isa: str, two_threads: None, monkeypatch: pytest.MonkeyPatch, format: str, dtype: torch.dtype
) -> None:
    weights = [random(*shape, seed=i).to(dtype) for i, shape in enumerate([*SHAPES, (200, 1000), (64, 97), (1, 64)])]
    spread = random(128, 256) * torch.logspace(-38, 37, 128)[:, None]  # blocks of all magnitudes
    spread[:, 64:] *= random(128, 192).exp2()  # and of values far apart
    spread[5], spread[6, 64:], spread[7] = 0, -0.0, random(256).sign()
    found = [formats.pack_panels(weight, format) for weight in [*weights, spread.to(dtype), spread.T.to(dtype)]]
    monkeypatch.setattr(library, "WISH", "fused")
    for weight, panels in zip([*weights, spread.to(dtype), spread.T.to(dtype)], found, strict=True):
        assert torch.equal(formats.pack_panels(weight, format), panels)


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_that_are_not_finite_give_no_finite_results(path: str, format: str) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = random(70, 130)
        weight[3, 65] = bad
        result = PackedLinear.pack(weight, format)(random(2, 130))
        if format == "fp8":  # whose blocks have 128 rows
            assert not result.isfinite().any()
            continue
        assert not result[:, 3].isfinite().any() and result[:, :3].isfinite().all() and result[:, 4:].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_packing_by_pieces_changes_nothing(path: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(300, 70).bfloat16()
    whole = formats.pack_panels(weight, format)
    monkeypatch.setattr(formats, "CHUNK", 1)
    monkeypatch.setattr(formats, "PLAIN_CHUNK", 1)
    out = torch.zeros_like(whole)
    assert formats.pack_panels(weight, format, out=out) is out
    assert torch.equal(out, whole)
    parts = formats.RowSource([weight[:70], weight[70:]], weight.dtype)
    assert torch.equal(formats.pack_panels(parts, format), whole)
    assert torch.equal(formats.pack_panels(weight[128:256], format), whole[2:4])


@pytest.mark.parametrize("block", [(128, 128), (1, 300), (256, 300), (1, 128), (64, 256)], ids=str)
@pytest.mark.parametrize("shape", [(256, 300), (70, 300), (1, 300)], ids=str)
def test_codes_and_scales_are_kept(path: str, block: tuple[int, int], shape: tuple[int, int]) -> None:
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bits[(bits & 127) == 127] = 1  # NaN
    grid = [-(-side // step) for side, step in zip(shape, block, strict=True)]
    codes = Codes("fp8", bits.view(torch.float8_e4m3fn), random(*grid).abs() + 0.1, block)
    panels = formats.pack_codes([codes])
    values = formats.unpack_panels(panels, "fp8").transpose(1, 2).flatten(0, 1)[: shape[0], : shape[1]]
    for m in range(0, shape[0], 13):
        for k in range(0, shape[1], 7):
            assert values[m, k] == codes.codes[m, k].float() * codes.scales[m // block[0], k // block[1]]
    assert torch.equal(values, codes.values())
    both = formats.unpack_panels(formats.pack_codes([codes, codes]), "fp8").transpose(1, 2).flatten(0, 1)
    assert torch.equal(both[: 2 * shape[0], : shape[1]], torch.cat([values, values]))


def test_every_code_is_multiplied_exactly(path: str) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    finite = bits[(bits & 127) != 127][:, None]
    packed = PackedLinear.empty("fp8", len(finite), 1)
    packed.fill_codes([Codes("fp8", finite.view(torch.float8_e4m3fn), torch.ones(2, 1), (128, 128))])
    for rows in (1, 3, 9):
        for dtype in (torch.float32, torch.bfloat16):
            out = packed(torch.ones(rows, 1, dtype=dtype))
            assert torch.equal(out.float(), finite.view(torch.float8_e4m3fn).float().T.expand(rows, -1))


def test_groups_of_int4_codes_are_kept(path: str) -> None:
    bits = torch.randint(0, 16, (70, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = Codes("int4", bits, random(70, 3).bfloat16(), (1, 32))
    values = formats.unpack_panels(formats.pack_codes([codes]), "int4").transpose(1, 2).flatten(0, 1)
    assert torch.equal(values[:70], (bits.float() - 8) * codes.scales.float().repeat_interleave(32, 1))


def test_scales_of_finer_blocks_are_refused() -> None:
    codes = Codes("fp8", torch.zeros(4, 128).to(torch.float8_e4m3fn), torch.ones(4, 2), (1, 64))
    with pytest.raises(ValueError, match="a scale for every 64 values"):
        formats.pack_codes([codes])


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.006), ("int4", 0.09), ("fp8", 0.028)])
def test_quantising_costs_little(format: str, bound: float) -> None:
    weight = random(256, 512)
    values = formats.unpack_panels(formats.pack_panels(weight, format), format).transpose(1, 2).flatten(0, 1)
    assert (values - weight).norm() < bound * weight.norm()


def test_int4_scales_are_the_best_for_their_codes() -> None:
    weight = random(40, 64)
    codes, scales = formats.quantize(weight, "int4")

    def cost(factor: float) -> Tensor:
        values = codes.unflatten(-1, (-1, 32)) * (scales.float() * factor).unsqueeze(-1)
        return (values - weight.unflatten(-1, (-1, 32))).square().sum()

    assert cost(1.0) < cost(1.01) and cost(1.0) < cost(0.99)
    assert codes.min() == -8 and codes.max() <= 7


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_extreme_weights_stay_finite(format: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 5], weight[3] = 1e-40, 3e38, -1e-30
    values = formats.unpack_panels(formats.pack_panels(weight, format), format).transpose(1, 2).flatten(0, 1)
    assert values.isfinite().all() and not values[0].any()
    assert values[2, 5] == pytest.approx(3e38, rel=0.01)


@pytest.mark.parametrize(("format", "length"), [("int8", 64), ("int4", 32)])
def test_rows_are_rounded_to_127ths_of_their_blocks(format: str, length: int) -> None:
    x = random(3, 128)
    x[0, :length] = 0
    rounded = formats.round_rows(x, format)
    for block, kept in zip(x.split(length, 1), rounded.split(length, 1), strict=True):
        step = block.abs().amax(1, keepdim=True) / 127
        assert ((block - kept).abs() <= step * 0.5001).all()
    x[1, 3] = torch.inf
    assert formats.round_rows(x, format)[1, :length].isnan().all()


def test_rows_are_those_of_the_whole() -> None:
    parts = [torch.randn(rows, 3, dtype=torch.float64) for rows in (5, 1, 0, 7)]
    rows, whole = formats.RowSource(parts, torch.float32), torch.cat(parts).float()
    assert rows.shape == whole.shape
    for first in range(13):
        for last in range(first + 1, 16):
            assert torch.equal(rows[first:last], whole[first:last])
