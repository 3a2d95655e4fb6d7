"""Packed layouts, read back value by value as the documentation says, and what quantising costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.serving import formats
from moestro.ops.serving.weights import PackedLinear

KINDS = list(formats.LAYOUTS)
SHAPES = [(1, 1), (64, 64), (65, 33), (130, 129), (3, 0), (0, 5)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bf16(low: int, high: int) -> float:
    return float(torch.tensor([low, high], dtype=torch.uint8).view(torch.bfloat16))


def read(panels: Tensor, kind: str, m: int, k: int) -> float:
    """W[m, k] from the bytes, by the table in `quantize.py`."""
    length, size = {"fp32": (1, 256), "bf16": (2, 256), "int8": (64, 4224), "int4": (32, 1152)}[kind]
    block = panels[m // 64].tolist()[k // length * size :][:size]
    m, k = m % 64, k % length
    if kind == "fp32":
        return float(torch.tensor(block[4 * m : 4 * m + 4], dtype=torch.uint8).view(torch.float32))
    if kind == "bf16":
        return bf16(*block[4 * m + 2 * k : 4 * m + 2 * k + 2])
    codes = size - 128
    scale = bf16(*block[codes + 2 * m : codes + 2 * m + 2])
    if kind == "int8":
        return scale * (block[k // 4 * 256 + 4 * m + k % 4] - 128)
    byte = block[k % 16 // 4 * 256 + 4 * m + k % 4]
    return scale * ((byte >> 4 if k >= 16 else byte & 15) - 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_lie_where_the_table_says(kind: str, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    panels = formats.pack_panels(weight, kind)
    assert tuple(panels.shape) == formats.panel_shape(*shape, kind)
    values = formats.unpack_panels(panels, kind).transpose(1, 2).flatten(0, 1)
    bound = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.005, "int4": 0.15}[kind]  # of the largest magnitude in its block
    if weight.numel():
        largest = float(weight.abs().max())
        assert float((values[: shape[0], : shape[1]] - weight).abs().max()) <= bound * largest
    for m in range(0, shape[0], 7):
        for k in range(0, shape[1], 5):
            assert read(panels, kind, m, k) == values[m, k]
    assert not values[shape[0] :].any() and not values[:, shape[1] :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_packing_is_plain_packing(
    isa: str, two_threads: None, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    weights = [random(*shape, seed=i).to(dtype) for i, shape in enumerate([*SHAPES, (200, 1000), (64, 97), (1, 64)])]
    spread = random(128, 256) * torch.logspace(-38, 37, 128)[:, None]  # blocks of all magnitudes
    spread[:, 64:] *= random(128, 192).exp2()  # and of values far apart
    spread[5], spread[6, 64:], spread[7] = 0, -0.0, random(256).sign()
    found = [formats.pack_panels(weight, kind) for weight in [*weights, spread.to(dtype), spread.T.to(dtype)]]
    monkeypatch.setattr(library, "PLAIN", True)
    for weight, panels in zip([*weights, spread.to(dtype), spread.T.to(dtype)], found, strict=True):
        assert torch.equal(formats.pack_panels(weight, kind), panels)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_that_are_not_finite_give_no_finite_results(path: str, kind: str) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = random(70, 130)
        weight[3, 65] = bad
        result = PackedLinear.pack(weight, kind)(random(2, 130))
        assert not result[:, 3].isfinite().any() and result[:, :3].isfinite().all() and result[:, 4:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_packing_by_pieces_changes_nothing(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(300, 70).bfloat16()
    whole = formats.pack_panels(weight, kind)
    monkeypatch.setattr(formats, "CHUNK", 1)
    monkeypatch.setattr(formats, "PLAIN_CHUNK", 1)
    out = torch.zeros_like(whole)
    assert formats.pack_panels(weight, kind, out=out) is out
    assert torch.equal(out, whole)
    parts = formats.RowSource([weight[:70], weight[70:]], weight.dtype)
    assert torch.equal(formats.pack_panels(parts, kind), whole)
    assert torch.equal(formats.pack_panels(weight[64:128], kind)[0], whole[1])


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.006), ("int4", 0.09)])
def test_quantising_costs_little(kind: str, bound: float) -> None:
    weight = random(256, 512)
    values = formats.unpack_panels(formats.pack_panels(weight, kind), kind).transpose(1, 2).flatten(0, 1)
    assert (values - weight).norm() < bound * weight.norm()


def test_int4_scales_are_the_best_for_their_codes() -> None:
    weight = random(40, 64)
    codes, scales = formats.quantize(weight, "int4")

    def cost(factor: float) -> Tensor:
        values = codes.unflatten(-1, (-1, 32)) * (scales.float() * factor).unsqueeze(-1)
        return (values - weight.unflatten(-1, (-1, 32))).square().sum()

    assert cost(1.0) < cost(1.01) and cost(1.0) < cost(0.99)
    assert codes.min() == -8 and codes.max() <= 7


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_weights_stay_finite(kind: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 5], weight[3] = 1e-40, 3e38, -1e-30
    values = formats.unpack_panels(formats.pack_panels(weight, kind), kind).transpose(1, 2).flatten(0, 1)
    assert values.isfinite().all() and not values[0].any()
    assert values[2, 5] == pytest.approx(3e38, rel=0.01)


@pytest.mark.parametrize(("kind", "length"), [("int8", 64), ("int4", 32)])
def test_rows_are_rounded_to_127ths_of_their_blocks(kind: str, length: int) -> None:
    x = random(3, 128)
    x[0, :length] = 0
    rounded = formats.round_rows(x, kind)
    for block, kept in zip(x.split(length, 1), rounded.split(length, 1), strict=True):
        step = block.abs().amax(1, keepdim=True) / 127
        assert ((block - kept).abs() <= step * 0.5001).all()
    x[1, 3] = torch.inf
    assert formats.round_rows(x, kind)[1, :length].isnan().all()


def test_rows_are_those_of_the_whole() -> None:
    parts = [torch.randn(rows, 3, dtype=torch.float64) for rows in (5, 1, 0, 7)]
    rows, whole = formats.RowSource(parts, torch.float32), torch.cat(parts).float()
    assert rows.shape == whole.shape
    for first in range(13):
        for last in range(first + 1, 16):
            assert torch.equal(rows[first:last], whole[first:last])
