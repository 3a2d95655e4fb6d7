"""Rows of an FP8 cache, on every instruction set of this CPU and in plain torch: layout, codes, and attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.fp8 import dequantize_fp8, quantize_fp8
from moestro.ops.serving.attention import paged_attention
from moestro.ops.serving.fp8_rows import row_bytes, store_rows, unpack_rows
from moestro.ops.serving.program import Eager, Heads, Operand, Operations, StepLayout, Tape, Value

pytestmark = pytest.mark.usefixtures("path")
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(512, 64), (128, 2), (130, 34), (13, 4), (1, 0)]  # codes, the rest


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cache_of(x: Tensor, coded: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pages that hold x [L, W] in shuffled order, bytes never written being NaN codes, and their table."""
    count = -(-len(x) // 64)
    pages = torch.full((count + 1, 64, row_bytes(coded, x.shape[1])), 0x7F, dtype=torch.uint8)
    table = torch.randperm(count + 1, generator=torch.Generator().manual_seed(seed))[:count].int()
    at = torch.arange(len(x))
    store_rows(pages, table[at // 64].long() * 64 + at % 64, x, coded)
    return pages, table


def widen(pages: Tensor, coded: int, width: int, dtype: torch.dtype) -> Tensor:
    return unpack_rows(pages.flatten(0, 1), coded, width, dtype).unflatten(0, (-1, 64)).contiguous()


def test_the_layout_is_that_of_deepseek() -> None:
    assert row_bytes(512, 576) == 656
    x = random(3, 576)
    pages = torch.zeros(1, 64, 656, dtype=torch.uint8)
    store_rows(pages, torch.tensor([5, 0, 63]), x, 512)
    raw = pages[0].numpy()
    assert not raw[1:5].any() and not raw[6:63].any()
    for row, tokens in zip(raw[[5, 0, 63]], x, strict=True):
        scales = torch.from_numpy(row[512:528].view("float32").copy())
        assert torch.equal(scales, tokens[:512].view(4, 128).abs().amax(1) / 448)
        rotated = torch.from_numpy(row[528:].view("int16").copy()).view(torch.bfloat16)
        assert torch.equal(rotated, tokens[512:].bfloat16())
        exact = (tokens[:512].view(4, 128) / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten()
        assert torch.equal(torch.from_numpy(row[:512].copy()), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("coded", "rest"), SIZES)
def test_stored_rows_are_quantised_tile_by_tile(coded: int, rest: int, dtype: torch.dtype) -> None:
    x = random(90, coded + rest) * torch.logspace(-9, 30, 90)[:, None]  # from below DeepSeek's floor on
    x[3], x[4, ::2] = 0, 0
    ties = torch.arange(coded) % 128 / 16 * 2.0**-6  # subnormal codes and ties, with scale 1
    x[5, :coded] = torch.where(torch.arange(coded) % 128 == 0, 448.0, ties)
    x[6] = -x[5]
    x = x.to(dtype)
    pages, table = cache_of(x, coded)
    rows = pages[table.long()].flatten(0, 1)[:90]
    codes, scales = quantize_fp8(x[:, :coded], (1, 128), least=1e-4)
    assert torch.equal(rows[:, :coded], codes.view(torch.uint8))
    assert torch.equal(rows[:, coded : coded + 4 * scales.shape[1]], scales.view(torch.uint8))
    found = unpack_rows(rows, coded, coded + rest, dtype)
    assert torch.equal(found[:, :coded], dequantize_fp8(codes, scales, (1, 128), dtype))
    assert torch.equal(found[:, coded:], x[:, coded:].bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("coded", "rest"), [(512, 64), (130, 34), (13, 4)])
def test_attention_is_that_over_the_widened_rows(path: str, coded: int, rest: int, dtype: torch.dtype) -> None:
    """Bit for bit, in chunks and whole, for any number of threads, and over selected rows."""
    length, heads = 140 if path == "plain" else 600, 5
    pages, table = cache_of(random(length, coded + rest).to(dtype), coded)
    plain = widen(pages, coded, coded + rest, dtype)
    q = random(length, heads, coded + rest, seed=1).to(dtype)
    numbers: dict[str, Any] = {"groups": 1, "value_offset": 0, "value_width": coded, "scale": 0.1}
    whole = paged_attention(q, plain, table[None], torch.tensor([0, length]), torch.tensor([0]), **numbers)
    for first, count in ((0, length), (0, 1), (length - 1, 1), (63, 70)):
        places = (table[None], torch.tensor([0, count]), torch.tensor([first]))
        own = q[first : first + count]
        expected = paged_attention(own, plain, *places, **numbers)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(paged_attention(own, pages, *places, **numbers), expected)
        assert torch.equal(expected, whole[first : first + count]) and expected.isfinite().all()
    chosen = torch.tensor([[0, 5, 64, -1], [7, 63, 66, 70]], dtype=torch.int32)
    places = (table[None], torch.tensor([0, 2]), torch.tensor([69]))
    some = [paged_attention(q[:2], rows, *places, **numbers, selection=chosen) for rows in (pages, plain)]
    assert torch.equal(*some) and not torch.equal(some[0], whole[:2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_makes_its_tile_nan(bad: float, dtype: torch.dtype) -> None:
    x = random(70, 300).to(dtype)
    x[2, 130] = bad
    pages, table = cache_of(x, 290)
    rows = unpack_rows(pages[table.long()].flatten(0, 1)[:70], 290, 300, dtype)
    lost = torch.zeros(70, 300, dtype=torch.bool)
    lost[2, 128:256] = True
    assert torch.equal(rows.isnan(), lost) and not rows.isinf().any()
    q = random(1, 2, 300).to(dtype)
    numbers: dict[str, Any] = {"groups": 1, "value_offset": 0, "value_width": 290, "scale": 0.1}
    for first in (1, 2):
        places = (table[None], torch.tensor([0, 1]), torch.tensor([first]))
        out = paged_attention(q, pages, *places, **numbers)
        assert out.isnan().all() if first == 2 else out.isfinite().all()


def store_and_attend(rows: Operations[Value], x: Value, queries: Value) -> Value:
    rows.store(0, "latent", rows.group(x, 1), 24)
    return rows.attend(0, "latent", rows.group(queries, 2), Heads(1, 0, 24, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tape_computes_what_its_operations_do(path: str, dtype: torch.dtype) -> None:
    x, q, ids = random(9, 30).to(dtype), random(9, 60, seed=1).to(dtype), torch.zeros(0, 9, 0, dtype=torch.int64)
    angles, slots = torch.zeros(9, 3), torch.arange(9) + 60
    where = StepLayout(slots, torch.tensor([[0, 1]]).int(), torch.tensor([0, 9]), torch.tensor([60]), angles, angles)
    layers = [[{"latent": torch.zeros(2, 64, row_bytes(24, 30), dtype=torch.uint8)}] for _ in range(2)]
    eager = store_and_attend(Eager(where, layers[0], ids), x[:, None], q[:, None])
    stored = layers[0][0]["latent"].flatten(0, 1)
    assert (stored != 0).any(1).nonzero().flatten().tolist() == slots.tolist()
    if path == "plain":
        return
    tape = Tape(dtype)
    begin, queries = tape.value(30), tape.value(60)
    end: Operand = store_and_attend(tape, begin, queries)
    inputs = [(begin, x), (queries, q)]
    assert torch.equal(tape.run(inputs, where, layers[1], ids, end), eager.flatten(1))
    assert torch.equal(layers[1][0]["latent"], layers[0][0]["latent"])
    for wrong in (row_bytes(24, 30) + 1, 30):
        with pytest.raises(RuntimeError, match="impossible size"):
            tape.run(inputs, where, [{"latent": torch.zeros(2, 64, wrong, dtype=torch.uint8)}], ids, end)
    slots[3] = 128
    with pytest.raises(RuntimeError, match="impossible size"):
        tape.run(inputs, where, layers[1], ids, end)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_rows": -1}, 2), ({"num_rows": 2**62}, 2), ({"num_pages": 0}, 2), ({"num_pages": 2**60}, 2),
        ({"row_bytes": 27}, 2), ({"width": 9}, 2), ({"width": 2**62}, 2), ({"coded": 13}, 2), ({"coded": -1}, 2),
        ({"type": 2}, 1), ({"threads": 0}, 2),
    ],
)  # fmt: skip
def test_hostile_rows_are_refused(change: dict[str, int], code: int) -> None:
    kernels = library.load_library()
    if kernels is None:
        pytest.skip("needs the native kernels")
    sizes = {"num_rows": 4, "num_pages": 1, "row_bytes": 20, "width": 12, "coded": 8, "type": 0, "threads": 1}
    pages, x, slots = torch.full((64, 20), 5, dtype=torch.uint8), torch.zeros(4, 12), torch.arange(4)
    where = [t.data_ptr() for t in (pages, x, slots)]
    assert kernels.moestro_store_fp8_rows(*where, *(sizes | change).values()) == code
    assert (pages == 5).all()


@pytest.mark.parametrize(
    "change", [{"groups": 2}, {"value_offset": 1}, {"page_width": 21}, {"page_type": 3}, {"page_type": 1}]
)
def test_hostile_pages_are_refused(change: dict[str, int]) -> None:
    kernels = library.load_library()
    if kernels is None:
        pytest.skip("needs the native kernels")
    sizes = {
        "num_rows": 1, "num_pages": 1, "num_sequences": 1, "max_pages": 1, "num_heads": 2, "key_width": 12,
        "value_width": 8, "page_width": 20, "groups": 1, "value_offset": 0,
    }  # fmt: skip
    out, q, pages = torch.full((2, 8), 5.0), torch.zeros(2, 12), torch.zeros(64, 20, dtype=torch.uint8)
    places = (torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]), torch.tensor([3]))
    where = [t.data_ptr() for t in (out, q, pages, *places)]
    page_type = change.get("page_type", 2)
    numbers = [(sizes | change)[name] for name in sizes]
    assert kernels.moestro_paged_attention(*where, *numbers, None, 0, 1.0, page_type, 0, 1) in (1, 2)
    assert (out == 5).all()
