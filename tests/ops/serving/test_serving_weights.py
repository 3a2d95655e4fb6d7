"""Serving operations on every instruction set of this CPU and in plain torch: values, independent rows, hostile sizes.

Values are held against fp64. Bounds: a sum of K products in fp32 errs by at most about K · eps · Σ |a||b|; inputs and
outputs in bf16 add 2⁻⁸ each way; codes are exact, so quantised weights are held against what codes stand for.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops import library
from moestro.ops.serving import formats
from moestro.ops.serving.attention import paged_attention
from moestro.ops.serving.rows import rms_norm, swiglu
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear
from moestro.ops.training import reference

pytestmark = pytest.mark.usefixtures("path")
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = ["fp32", "bf16", "int8", "int4", "fp8"]
SLICES = (slice(0, 1), slice(5, 7), slice(3, 19), slice(40, 129))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_of(panels: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """The matrix that panels stand for, fp64."""
    return formats.unpack_panels(panels, format).transpose(-1, -2).flatten(-3, -2)[..., :rows, :columns].double()


def rounded(x: Tensor, format: str) -> Tensor:
    """What rows become before they meet weights of a format, fp64, by the definition."""
    length = {"int8": 64, "int4": 32}.get(format)
    if length is None:
        return x.double()
    blocks = F.pad(x.float(), (0, -x.shape[1] % length)).unflatten(1, (-1, length))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    codes = (blocks * (torch.tensor(127.0) / largest)).round()
    return (codes.double() * (largest / 127)).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_linear_is_within_the_bound(format: str, dtype: torch.dtype) -> None:
    sizes = [(1, 1, 1), (3, 65, 77), (7, 64, 128), (16, 200, 96), (25, 130, 333), (100, 70, 515), (0, 3, 4), (2, 0, 4)]
    for n, m, k in [*sizes, (2, 3, 0), (200, 300, 31)]:
        x = random(n, k).to(dtype)
        packed = PackedLinear.pack(random(m, k, seed=1), format)
        weight, rows = values_of(packed.panels, format, m, k), rounded(x, format)
        exact = rows @ weight.T
        bound = (k + 4) * 2.0**-24 * (rows.abs() @ weight.abs().T)
        if dtype == torch.bfloat16:
            bound += 2.0**-8 * exact.abs()
        out = packed(x)
        assert out.dtype == dtype and out.shape == (n, m)
        assert ((out.double() - exact).abs() <= bound + 1e-30).all(), (n, m, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_a_linear_depends_on_itself_alone(format: str, dtype: torch.dtype) -> None:
    packed, x = PackedLinear.pack(random(130, 300, seed=1), format), random(130, 300).to(dtype)
    whole = packed(x)
    for rows in SLICES:
        assert torch.equal(packed(x[rows]), whole[rows])
    assert torch.equal(packed(x.flip(0)).flip(0), whole)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(packed(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 16, 8), (3, 65, 33), (1, 128, 64)])
def test_heads_are_a_linear_each(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    heads, out, inner = shape
    weight, x = random(*shape, seed=1).to(dtype), random(9, heads, inner).to(dtype)
    packed = PackedHeads.pack(weight)
    whole = packed(x)
    assert whole.shape == (9, heads, out)
    for h in range(heads):
        assert torch.equal(whole[:, h], PackedLinear.pack(weight[h], packed.format)(x[:, h]))
    assert torch.equal(packed(x[4:5]), whole[4:5])


def in_tiles(x: Tensor) -> Tensor:
    """x in E4M3 with a scale for every 128 values of a row, fp64, by DeepSeek's act_quant."""
    out = torch.empty_like(x, dtype=torch.float64)
    for first in range(0, x.shape[1], 128):
        tile = x[:, first : first + 128].float()
        scale = tile.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
        out[:, first : first + 128] = (tile / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_rounded_to_fp8(dtype: torch.dtype) -> None:
    packed, x = PackedLinear.pack(random(130, 300, seed=1), "fp8"), random(20, 300).to(dtype)
    x[3], x[4, :128], x[5] = 0, 1e-6, 1e30
    packed.rounds_rows = True
    out, rows, weight = packed(x), in_tiles(x), values_of(packed.panels, "fp8", 130, 300)
    bound = 400 * 2.0**-24 * (rows.abs() @ weight.abs().T)
    if dtype == torch.bfloat16:
        bound += 2.0**-8 * (rows @ weight.T).abs()
    assert ((out.double() - rows @ weight.T).abs() <= bound + 1e-30).all()
    for rows_alone in (slice(0, 1), slice(5, 7), slice(3, 19)):
        assert torch.equal(packed(x[rows_alone]), out[rows_alone])
    x[6, 7], x[7, 299] = torch.inf, torch.nan
    assert not packed(x)[6:8].isfinite().any() and torch.equal(packed(x)[:6], out[:6])


def test_only_fp8_weights_meet_rows_in_fp8() -> None:
    packed = PackedLinear.pack(random(3, 4), "int8")
    packed.rounds_rows = True
    with pytest.raises(ValueError, match="rows meet int8 weights as they are"):
        packed.code  # noqa: B018


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_experts_may_be_rounded_to_fp8(dtype: torch.dtype) -> None:
    x, gate_up, down, ids, weights = expert_inputs(37, [1.0, 1, 1, 1, 0], 64, 32, dtype)
    packed = PackedExperts.pack(gate_up, down, "fp8")
    halves = values_of(packed.gate_up, "fp8", 64, 64)
    exact_down, rows = values_of(packed.down, "fp8", 64, 32), in_tiles(x)
    exact = torch.zeros(len(x), 64, dtype=torch.float64)
    for n in range(len(x)):
        for expert, weight in zip(ids[n].tolist(), weights[n].double().tolist(), strict=True):
            gate, up = (rows[n] @ halves[expert].T).chunk(2)
            exact[n] += weight * (in_tiles((F.silu(gate) * up)[None])[0] @ exact_down[expert].T)
    packed.rounds_rows = True
    out = packed(x, ids, weights)
    # a sum in another order may round a code the other way, which differs by up to 1 / 16
    assert (out.double() - exact).norm() <= 0.01 * exact.norm()
    assert torch.equal(packed(x[5:7], ids[5:7], weights[5:7]), out[5:7])


def expert_inputs(n: int, loads: list[float], hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, gate_up, down, ids, weights; shares of the choices, the last one of those not carried out."""
    experts, generator = len(loads) - 1, torch.Generator().manual_seed(3)
    ids = torch.multinomial(torch.tensor(loads), 2 * n, replacement=True, generator=generator).view(n, 2)
    gate_up = random(experts, 2 * width, hidden, seed=4) / hidden**0.5
    down = random(experts, hidden, width, seed=5) / width**0.5
    return random(n, hidden, seed=6).to(dtype), gate_up, down, ids, torch.rand(n, 2, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("loads", "hidden", "width"),
    [([1.0, 1, 1, 1, 0], 64, 32), ([0.0, 5, 0, 1, 1], 33, 17), ([1.0, 0], 100, 70), ([0.0, 0, 1], 8, 4)],
)
def test_experts_equal_the_reference(
    format: str, dtype: torch.dtype, loads: list[float], hidden: int, width: int
) -> None:
    x, gate_up, down, ids, weights = expert_inputs(37, loads, hidden, width, dtype)
    packed = PackedExperts.pack(gate_up, down, format)
    halves = values_of(packed.gate_up, format, -(-width // 32) * 64, hidden).unflatten(1, (-1, 2, 32))
    exact_up = halves.transpose(1, 2).flatten(2, 3)[:, :, :width].flatten(1, 2)
    exact_down = values_of(packed.down, format, hidden, width)
    rows = rounded(x, format)
    exact = reference.grouped_experts(rows, exact_up, exact_down, ids, weights.double())
    quantised, narrow = format in ("int8", "int4"), dtype == torch.bfloat16
    close = 0.02 if quantised else 0.01 if narrow else 1e-5  # activations between the products are rounded to 8 bits
    out = packed(x, ids, weights)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= close * exact.norm() + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_token_of_the_experts_depends_on_itself_alone(format: str, dtype: torch.dtype) -> None:
    x, gate_up, down, ids, weights = expert_inputs(130, [4.0, 1, 1, 0, 1], 66, 34, dtype)
    packed = PackedExperts.pack(gate_up, down, format)
    whole = packed(x, ids, weights)
    for rows in SLICES:
        assert torch.equal(packed(x[rows], ids[rows], weights[rows]), whole[rows])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(packed(x, ids, weights), whole)
    assert packed(x[:0], ids[:0], weights[:0]).shape == (0, 66)


def test_many_tokens_are_taken_in_turns(path: str) -> None:
    if path == "plain":
        pytest.skip("a loop of the native kernels")
    x, gate_up, down, ids, weights = expert_inputs(2500, [1.0, 1, 1, 1, 1], 8, 4, torch.float32)
    exact = reference.grouped_experts(x.double(), gate_up.double(), down.double(), ids, weights.double())
    found = PackedExperts.pack(gate_up, down, "fp32")(x, ids, weights).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


class Cache:
    """Sequences of the given lengths in shuffled pages; what was never written is not a number."""

    def __init__(self, lengths: list[int], width: int, dtype: torch.dtype, seed: int = 0) -> None:
        used = [-(-length // 64) for length in lengths]
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(sum(used) + 3, generator=generator).int()
        self.pages = torch.full((len(places), 64, width), torch.nan, dtype=dtype)
        self.tables = torch.zeros(len(lengths), max(used) + 1, dtype=torch.int32)
        self.rows = []
        for s, length in enumerate(lengths):
            own = places[sum(used[:s]) : sum(used[: s + 1])]
            self.tables[s, : used[s]] = own
            self.rows.append(random(length, width, seed=100 + s).to(dtype))
            for page, rows in zip(own.tolist(), self.rows[s].split(64), strict=True):
                self.pages[page, : len(rows)] = rows

    def attend(
        self, queries: list[Tensor], which: list[int], first: list[int], numbers: Mapping[str, object]
    ) -> list[Tensor]:
        """Queries [n, H, K] of some sequences, the first of them at a position -> [n, H, V] each."""
        counts = [len(q) for q in queries]
        starts = torch.tensor([0, *counts]).cumsum(0)
        args = (torch.cat(queries), self.pages, self.tables[which], starts, torch.tensor(first))
        return list(paged_attention(*args, **numbers).split(counts))  # type: ignore[arg-type]


# groups, heads, key width, value width, value offset, width of a group
MLA, GQA, MHA, ODD = (1, 16, 48, 32, 0, 48), (2, 6, 24, 16, 24, 40), (4, 4, 33, 20, 33, 53), (1, 20, 41, 70, 8, 78)
WIDE = (1, 80, 24, 16, 0, 24)


def attention_numbers(shape: tuple[int, ...]) -> dict[str, object]:
    return {"groups": shape[0], "value_width": shape[3], "value_offset": shape[4], "scale": shape[2] ** -0.5}


def brute_force(q: Tensor, rows: Tensor, first: int, shape: tuple[int, ...]) -> Tensor:
    groups, heads, key, value, offset, width = shape
    keys, out = rows.double().unflatten(1, (groups, width)), torch.zeros(len(q), heads, value, dtype=torch.float64)
    for i in range(len(q)):
        seen = keys[: first + i + 1].repeat_interleave(heads // groups, 1)  # [L, H, w]
        weights = (torch.einsum("lhk,hk->hl", seen[..., :key], q[i].double()) * key**-0.5).softmax(-1)
        out[i] = torch.einsum("hl,lhv->hv", weights, seen[..., offset : offset + value])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [MLA, GQA, MHA, ODD, WIDE], ids=["mla", "gqa", "mha", "odd", "wide"])
def test_attention_equals_brute_force(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    lengths, counts = [1, 63, 64, 65, 300, 600], [1, 2, 1, 65, 7, 1]
    cache = Cache(lengths, shape[0] * shape[5], dtype)
    queries = [random(n, shape[1], shape[2], seed=n).to(dtype) for n in counts]
    first = [length - n for length, n in zip(lengths, counts, strict=True)]
    out = cache.attend(queries, list(range(6)), first, attention_numbers(shape))
    close = 1e-5 if dtype == torch.float32 else 8e-3
    for s, found in enumerate(out):
        exact = brute_force(queries[s], cache.rows[s], first[s], shape)
        assert (found.double() - exact).norm() <= close * exact.norm(), s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [MLA, GQA], ids=["mla", "gqa"])
def test_a_query_depends_on_its_position_and_its_rows_alone(
    path: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    length = 140 if path == "plain" else 600  # more than two pages, more than two splits
    width, numbers = shape[0] * shape[5], attention_numbers(shape)
    cache, moved = Cache([length, 90, 1], width, dtype), Cache([length, 90, 1], width, dtype, seed=5)
    q = -random(length, shape[1], shape[2], seed=1).abs().to(dtype)
    for some in (cache, moved):  # negative scores only: no largest one is the 0 of a column that sees nothing
        some.pages.abs_()
    (whole,) = cache.attend([q], [0], [0], numbers)
    for begin, end in ((0, 1), (1, 65), (63, 64), (125, 130), (250, 260), (511, 513), (length - 1, length)):
        if end > length:
            continue
        (part,) = cache.attend([q[begin:end]], [0], [begin], numbers)
        assert torch.equal(part, whole[begin:end]), (begin, end)
        mixed = moved.attend([q[:1], q[begin:end], q[:90]], [2, 0, 1], [0, begin, 0], numbers)
        assert torch.equal(mixed[1], whole[begin:end]), (begin, end)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(cache.attend([q[-1:]], [0], [length - 1], numbers)[0], whole[-1:])
        assert torch.equal(cache.attend([q], [0], [0], numbers)[0], whole)


def choose_positions(length: int, first: int, count: int, seed: int) -> Tensor:
    """For each of `count` rows from a position on, up to `length` of those it may see, in order, filled up with -1."""
    generator, out = torch.Generator().manual_seed(seed), torch.full((count, length), -1, dtype=torch.int32)
    for i in range(count):
        chosen = torch.randperm(first + i + 1, generator=generator)[: length - i % 3].sort().values
        out[i, : len(chosen)] = chosen
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [MLA, GQA, ODD], ids=["mla", "gqa", "odd"])
def test_selected_rows_equal_brute_force_whatever_their_company(
    path: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    lengths, counts, most = [5, 200, 900], [3, 40, 2], 70 if path == "plain" else 300
    cache, numbers = Cache(lengths, shape[0] * shape[5], dtype), attention_numbers(shape)
    queries = [random(n, shape[1], shape[2], seed=n).to(dtype) for n in counts]
    first = [length - n for length, n in zip(lengths, counts, strict=True)]
    chosen = [choose_positions(most, f, n, f) for f, n in zip(first, counts, strict=True)]
    together = cache.attend(queries, [0, 1, 2], first, numbers | {"selection": torch.cat(chosen)})
    close = 1e-5 if dtype == torch.float32 else 8e-3
    for s, found in enumerate(together):
        for i, positions in enumerate(chosen[s]):
            rows = cache.rows[s][positions[positions >= 0].long()]
            exact = brute_force(queries[s][i : i + 1], rows, len(rows) - 1, shape)[0]
            assert (found[i].double() - exact).norm() <= close * exact.norm(), (s, i)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        wider = F.pad(chosen[1][5:9], (0, 50), value=-1)
        alone = cache.attend([queries[1][5:9]], [1], [first[1] + 5], numbers | {"selection": wider})
        assert torch.equal(alone[0], together[1][5:9])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_selection_of_all_positions_gives_the_bits_of_none(path: str, dtype: torch.dtype) -> None:
    length, rows = (140, 3) if path == "plain" else (600, 9)
    cache, q = Cache([length, 30], 48, dtype), random(rows + 2, 16, 48).to(dtype)
    queries, first, positions = [q[:rows], q[rows:]], [length - rows, 28], torch.arange(length, dtype=torch.int32)
    seen = torch.tensor([*range(length - rows, length), 28, 29])[:, None]
    selection = torch.where(positions <= seen, positions, -1)
    plain = cache.attend(queries, [0, 1], first, attention_numbers(MLA))
    selected = cache.attend(queries, [0, 1], first, attention_numbers(MLA) | {"selection": selection})
    assert all(torch.equal(*pair) for pair in zip(plain, selected, strict=True))


@pytest.mark.parametrize(
    "positions",
    [
        *([10, -1, -1], [0, 3, 10], [-1, -1, -1], [-1, 3, 4], [3, -1, 4], [3, 3, 4], [4, 3, -1], [-2, 3, 4]),
        *([3, -2, -1], [3, 2**31 - 1, -1], [-(2**31), 3, 4]),
    ],
)
def test_hostile_selections_are_refused(path: str, positions: list[int]) -> None:
    cache, q = Cache([10], 48, torch.float32), random(2, 16, 48)
    selection = torch.tensor([[0, 1, 2], positions], dtype=torch.int32)  # the second row is at position 9
    with pytest.raises((ValueError, RuntimeError), match=r"ascend|impossible size"):
        cache.attend([q], [0], [8], attention_numbers(MLA) | {"selection": selection})


@pytest.mark.parametrize("shape", [(2, 0), (1, 3), (3, 3), (6,)])
def test_selections_of_a_wrong_shape_are_refused(path: str, shape: tuple[int, ...]) -> None:
    cache, q = Cache([10], 48, torch.float32), random(2, 16, 48)
    selection = torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(ValueError, match="selection of"):
        cache.attend([q], [0], [8], attention_numbers(MLA) | {"selection": selection})
    with pytest.raises(ValueError, match="int64"):
        cache.attend([q], [0], [8], attention_numbers(MLA) | {"selection": torch.zeros(2, 3, dtype=torch.int64)})
    (none,) = cache.attend([q[:0]], [0], [8], attention_numbers(MLA) | {"selection": selection.new_zeros(0, 3)})
    assert none.shape == (0, 16, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    cache, q = Cache([300], 48, dtype), random(1, 16, 48).to(dtype) * 1000
    (out,) = cache.attend([q], [0], [299], attention_numbers(MLA))
    exact = brute_force(q, cache.rows[0], 299, MLA)
    assert (out.double() - exact).norm() <= 8e-3 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 128])
def test_norm_and_activation(width: int, dtype: torch.dtype) -> None:
    x, weight = random(50, 3, width).to(dtype), random(width, seed=1)
    out = rms_norm(x, weight, 1e-6)
    close = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        out.double(), F.rms_norm(x.double(), (width,), weight.double(), 1e-6), rtol=close, atol=1e-6
    )
    assert torch.equal(rms_norm(x[7:9], weight, 1e-6), out[7:9])
    assert torch.equal(rms_norm(x[7], weight, 1e-6), out[7])
    both = random(900, 2 * width).to(dtype) * 4
    act, (gate, up) = swiglu(both), both.double().chunk(2, -1)
    torch.testing.assert_close(act.double(), F.silu(gate) * up, rtol=close, atol=1e-6)
    for rows in SLICES:
        assert torch.equal(swiglu(both[rows]), act[rows])


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_survive_their_tensors(format: str) -> None:
    x, gate_up, down, ids, weights = expert_inputs(5, [1.0, 1, 0], 40, 24, torch.float32)
    experts, linear = PackedExperts.pack(gate_up, down, format), PackedLinear.pack(random(70, 40), format)
    heads = PackedHeads.pack(random(2, 70, 20), format)
    for packed, arguments in ((experts, (x, ids, weights)), (linear, (x,)), (heads, (x.view(5, 2, 20),))):
        again = type(packed).from_tensors({name: t.clone() for name, t in packed.tensors().items()})
        assert torch.equal(again(*arguments), packed(*arguments))
        assert again.nbytes == packed.nbytes
        broken = packed.tensors() | {"sizes": packed.tensors()["sizes"] + torch.tensor([0, 64, 0])}
        with pytest.raises(ValueError, match="bytes are not"):
            type(packed).from_tensors(broken)
    with pytest.raises(ValueError, match="format and sizes"):
        PackedLinear.from_tensors(linear.tensors() | {"sizes": torch.tensor([9, 70, 40])})


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, gate_up, down, ids, weights = expert_inputs(5, [1.0, 1, 0], 40, 24, torch.float32)
    with pytest.raises(ValueError, match="41"):
        PackedLinear.pack(random(3, 40), "fp32")(random(2, 41))
    with pytest.raises(ValueError, match="heads"):
        PackedHeads.pack(random(2, 3, 4))(random(5, 3, 4))
    with pytest.raises(ValueError, match="do not fit"):
        PackedExperts.pack(gate_up, down, "fp32")(x[:4], ids, weights)


def test_a_choice_of_no_expert_is_refused(path: str) -> None:
    if path == "plain":
        pytest.skip("indexing itself refuses")
    x, gate_up, down, ids, weights = expert_inputs(5, [1.0, 1, 0], 40, 24, torch.float32)
    for bad in (-1, 3):
        ids[2, 1] = bad
        with pytest.raises(RuntimeError, match="impossible size"):
            PackedExperts.pack(gate_up, down, "fp32")(x, ids, weights)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"n": -1}, 2), ({"n": 2**62}, 2), ({"m": 2**41}, 2), ({"k": 2**62}, 2), ({"k": -1}, 2), ({"groups": 2**40}, 2),
        ({"threads": 0}, 2), ({"threads": 2**20}, 2), ({"type": 7}, 1), ({"format": 6}, 1), ({"format": -1}, 1),
    ],
)  # fmt: skip
def test_hostile_sizes_are_refused(path: str, change: dict[str, int], code: int) -> None:
    kernels = library.load_library()
    if kernels is None:
        pytest.skip("needs the native kernels")
    sizes = {"groups": 1, "n": 4, "m": 4, "k": 4, "format": 0, "type": 0, "threads": 1}
    out = torch.full((4, 4), 5.0)
    address = out.data_ptr()
    assert kernels.moestro_packed_linear(address, address, address, *(sizes | change).values()) == code
    if not {"groups", "n"} & change.keys():
        m, k, *flags = [(sizes | change)[name] for name in ("m", "k", "format", "type", "threads")]
        assert kernels.moestro_pack(address, address, m, k, *flags) == code
    assert (out == 5).all()


@pytest.mark.parametrize(
    "change",
    [
        {"table": [0, 9]}, {"table": [0, -1]}, {"first": [64]}, {"first": [-1]}, {"starts": [1, 65]},
        {"starts": [0, 64]}, {"num_heads": -2}, {"num_heads": 0}, {"key_width": 9}, {"value_width": 9},
        {"value_offset": 1}, {"value_offset": -1}, {"groups": 3}, {"groups": 0}, {"num_pages": 1},
        {"num_rows": 2**61}, {"page_width": 2**60}, {"max_pages": 1},
    ],
)  # fmt: skip
def test_hostile_pages_are_refused(path: str, change: dict[str, object]) -> None:
    kernels = library.load_library()
    if kernels is None:
        pytest.skip("needs the native kernels")
    out, q, pages = torch.full((65, 2, 8), 5.0), torch.zeros(65, 2, 8), torch.zeros(2, 64, 8)
    arrays: dict[str, object] = {"table": [0, 1], "starts": [0, 65], "first": [0]}
    sizes = {
        "num_rows": 65, "num_pages": 2, "num_sequences": 1, "max_pages": 2, "num_heads": 2, "key_width": 8,
        "value_width": 8, "page_width": 8, "groups": 1, "value_offset": 0,
    }  # fmt: skip
    lists, numbers = {**arrays, **change}, {**sizes, **change}
    table = torch.tensor(lists["table"], dtype=torch.int32)
    starts, first = torch.tensor(lists["starts"]), torch.tensor(lists["first"])
    where = [t.data_ptr() for t in (out, q, pages, table, starts, first)]
    found = kernels.moestro_paged_attention(*where, *(numbers[name] for name in sizes), None, 0, 1.0, 0, 0, 1)
    assert found == 2
    assert (out == 5).all()
