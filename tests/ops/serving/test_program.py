"""Rotation, routing and tapes of serving, on every instruction set of this CPU and in plain torch."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.abi import Cache, Step
from moestro.ops.serving.program import Caches, Eager, Heads, Operand, Operations, StepLayout, Tape, Value
from moestro.ops.serving.rows import rope, route
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear
from moestro.routing.selection import Selection, choose, score_experts

pytestmark = pytest.mark.usefixtures("path")
DTYPES = [torch.float32, torch.bfloat16]
ROWS = (slice(0, 1), slice(5, 7), slice(3, 19), slice(40, 129))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 2), (130, 34), (130, 3, 64), (130, 5, 18), (0, 4, 8), (3, 0, 8), (1, 2, 16)])
def test_rope_rotates_pairs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wide = random(*shape[:-1], shape[-1] + 6).to(dtype)
    x, angles = wide[..., 3 : 3 + shape[-1]], random(shape[0], shape[-1] // 2, seed=1) * 9
    cos, sin = angles.cos() * 1.2, angles.sin() * 1.2
    out = rope(x, cos, sin)
    turn = torch.complex(cos.double(), sin.double()).view(shape[0], *[1] * (len(shape) - 2), shape[-1] // 2)
    exact = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    size = x.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1) * 1.2
    bound = 3 * 2.0**-24 * size + (2.0**-8 * exact.abs() if dtype == torch.bfloat16 else 0)
    assert out.dtype == dtype and out.shape == x.shape
    assert ((out.double() - exact).abs() <= bound).all()
    for rows in ROWS:
        assert torch.equal(rope(x[rows], cos[rows], sin[rows]), out[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_rope_is_the_gradient(dtype: torch.dtype) -> None:
    x, angles, dy = random(9, 3, 16).double().requires_grad_(), random(9, 8, seed=1), random(9, 3, 16, seed=2).to(dtype)
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2).backward(dy.double())
    assert x.grad is not None
    close = 1e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(
        rope(dy, angles.cos(), angles.sin(), inverse=True).double(), x.grad, rtol=close, atol=close
    )


def selection(num_experts: int, top_k: int, groups: int = 1, kept: int = 1, **changes: Any) -> Selection:
    plain: dict[str, Any] = {
        "bias": random(num_experts, seed=9) * 0.2 - 0.5, "score": "sigmoid", "group_best": 2, "scale": 2.5,
        "multiply": False, "normalize": True, "hashed": False, "layer": 0,
    }  # fmt: skip
    return Selection(top_k=top_k, num_groups=groups, top_k_groups=kept, **(plain | changes))


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("change", [{}, {"multiply": True}, {"group_best": 1}, {"normalize": False, "scale": 1.0}])
@pytest.mark.parametrize(
    "sizes", [(8, 2, 1, 1), (64, 8, 8, 3), (37, 5, 1, 1), (12, 4, 3, 2), (2, 2, 1, 1), (1, 1, 1, 1)]
)
def test_route_is_the_specification(sizes: tuple[int, ...], change: dict[str, object], score: str) -> None:
    if sizes[0] == 1 and change.get("group_best") != 1:
        change = {**change, "group_best": 1}
    s, logits = selection(*sizes, **change, score=score), random(130, sizes[0]) * 2
    ids, weights = route(logits, s)
    scores = score_experts(logits.double(), score)
    choice = scores * (1 + s.bias) if s.multiply else scores + s.bias
    exact_ids = choose(choice, s)
    exact = scores.gather(1, exact_ids)
    exact = (exact / (exact.sum(-1, keepdim=True) + 1e-20) if s.normalize else exact) * s.scale
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-7)
    for rows in ROWS:
        assert all(torch.equal(a, b[rows]) for a, b in zip(route(logits[rows], s), (ids, weights), strict=True))
    given = ids.flip(1)
    same, turned = route(logits, s, given)
    assert torch.equal(same, given)
    torch.testing.assert_close(turned, weights.flip(1))
    some = torch.where(torch.arange(len(logits))[:, None] % 2 == 0, given, -1)  # −1: chosen
    mixed, both = route(logits, s, some)
    assert torch.equal(mixed[1::2], ids[1::2]) and torch.equal(mixed[::2], given[::2])
    assert torch.equal(both[1::2], weights[1::2]) and torch.equal(both[::2], turned[::2])
    assert (some[1::2] == -1).all()  # not written to


def test_equal_scores_go_to_the_lowest_ids() -> None:
    zero = torch.zeros(12)
    ids, _ = route(torch.zeros(3, 12), selection(12, 4, 4, 2, bias=zero))
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    logits = torch.tensor([[0.0, 1, 1, 0, 1, 0, 1, 1]])
    assert route(logits, selection(8, 6, bias=torch.zeros(8)))[0].tolist() == [[1, 2, 4, 6, 7, 0]]
    assert route(torch.zeros(1, 4), selection(4, 4, bias=torch.full((4,), -torch.inf)))[0].tolist() == [[0, 1, 2, 3]]


def test_what_is_not_a_number_still_chooses_experts_that_exist() -> None:
    logits = random(6, 12)
    logits[1], logits[2, 3], logits[3] = torch.nan, torch.nan, torch.inf
    for score in ("sigmoid", "softmax", "sqrt_softplus"):
        ids, _ = route(logits, selection(12, 4, 4, 2, score=score))
        assert ((ids >= 0) & (ids < 12)).all()
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all()


def small_model(dtype: torch.dtype) -> tuple[dict[str, Any], Selection]:
    format = "fp32" if dtype == torch.float32 else "bf16"
    return {
        "down": PackedLinear.pack(random(2 * 12 + 8 + 4, 20, seed=1) / 4, format),
        "gate": PackedLinear.pack(random(8, 20, seed=2), "fp32"),
        "heads": PackedHeads.pack((random(2, 8, 8, seed=3) / 3).to(dtype)),
        "back": PackedLinear.pack(random(20, 16, seed=4) / 4, format),
        "experts": PackedExperts.pack(random(8, 20, 20, seed=5) / 4, random(8, 20, 10, seed=6) / 3, format),
        "weight": random(20, seed=7) * 0.1 + 1,
        "half": PackedLinear.pack(random(40, 20, seed=8) / 4, format),
    }, selection(8, 2, 4, 2)


def compute(rows: Operations[Value], x: Value, m: dict[str, Any], chosen: Selection) -> Value:
    """Every operation there is, on the two layers of `make_caches`."""
    for layer in range(2):
        with rows.scratch():
            down = rows.linear(m["down"], rows.norm(x, m["weight"], 1e-6))
            q, latent, key = rows.split(down, (24, 8, 4))
            parts = [latent, rows.rope(key), latent] if layer else [latent, rows.rope(key)]
            rows.store(layer, "latent", rows.join(parts))
            if layer:
                rows.store(layer, "key", rows.widen(key))
            plain, turned = rows.split(rows.group(q, 2), (8, 4))
            queries = rows.join([rows.heads(m["heads"], plain), rows.rope(turned)])
            x = rows.add(x, rows.linear(m["back"], rows.attend(layer, "latent", queries, Heads(1, 0, 8, 0.3))))
        with rows.scratch():
            weights = rows.route(layer, rows.linear(m["gate"], rows.widen(x)), chosen)
            x = rows.add(x, rows.experts(layer, m["experts"], x, weights))
    return rows.swiglu(rows.linear(m["half"], x))


def make_caches(dtype: torch.dtype) -> list[Caches]:
    """Three pages: a layer of one cache, then one of two caches, of other widths and one of another type."""
    wider = {"latent": torch.ones(3, 64, 20, dtype=dtype), "key": torch.ones(3, 64, 4)}
    return [{"latent": torch.ones(3, 64, 12, dtype=dtype)}, wider]


def all_values(layers: list[Caches]) -> list[Tensor]:
    return [cache for layer in layers for cache in layer.values()]


def places(lengths: list[int], rows: list[int]) -> StepLayout:
    """Sequences of these lengths, page s their own, the last `rows` of each to be computed."""
    spans = [range(n - r, n) for n, r in zip(lengths, rows, strict=True)]
    at = torch.tensor([p for span in spans for p in span])
    slots = torch.tensor([64 * s + p for s, span in enumerate(spans) for p in span])
    starts = torch.tensor([0, *rows]).cumsum(0)
    tables = torch.arange(len(lengths), dtype=torch.int32)[:, None].contiguous()
    angles = at[:, None] * torch.tensor([1.0, 0.1])
    return StepLayout(slots, tables, starts, torch.tensor([span.start for span in spans]), angles.cos(), angles.sin())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tape_computes_what_its_operations_do(path: str, dtype: torch.dtype) -> None:
    """Bit for bit, for any number of rows and threads; the cache and the experts, chosen or known before, too."""
    if path == "plain":
        pytest.skip("a tape needs the native kernels")
    model, chosen = small_model(dtype)
    tape = Tape(dtype)
    begin = tape.value(20)
    end: Operand = compute(tape, begin, model, chosen)
    for lengths, rows in (([9, 30, 1], [9, 30, 1]), ([10, 31, 2], [1, 1, 1]), ([64], [64]), ([1], [1])):
        x, where, caches, found = random(sum(rows), 20).to(dtype), places(lengths, rows), [], []
        known = torch.full((2, len(x), 2), -1)
        known[1, ::2] = torch.tensor([7, 0])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cache = make_caches(dtype)
            ids = known.clone()
            found.append((tape.run([(begin, x)], where, cache, ids, end), ids))
            caches.append(all_values(cache))
        cache = make_caches(dtype)
        ids = known.clone()
        expected = compute(Eager(where, cache, ids), x[:, None], model, chosen).flatten(1)
        for (out, chose), kept in zip(found, caches, strict=True):
            assert torch.equal(out, expected) and torch.equal(chose, ids)
            assert all(torch.equal(*pair) for pair in zip(kept, all_values(cache), strict=True))
        assert not all((cache == 1).all() for cache in kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tape_attends_to_selected_positions(path: str, dtype: torch.dtype) -> None:
    """Eager as well; the latter also in plain torch."""
    where, q, layers = places([9, 30], [2, 3]), random(5, 2, 8).to(dtype), [{"kv": random(2, 64, 12, seed=1).to(dtype)}]
    seen = torch.tensor([[0, 3, 7], [8, -1, -1], [1, 2, 27], [5, 28, -1], [0, 14, 29]], dtype=torch.int32)
    heads, ids = Heads(1, 4, 8, 0.3), torch.zeros(0, 5, 0, dtype=torch.int64)
    eager = Eager(where, layers, ids).attend(0, "kv", q, heads, seen[:, None])
    unselected = Eager(where, layers, ids).attend(0, "kv", q, heads)
    assert not (eager == unselected).flatten(1).all(1).any()
    if path == "plain":
        return
    tape = Tape(dtype)
    begin, chosen = tape.value(16), tape.value(3, wide=True)
    out = tape.attend(0, "kv", tape.group(begin, 2), heads, chosen)
    found = tape.run([(begin, q.flatten(1)), (chosen, seen)], where, layers, ids, out)
    assert torch.equal(found, eager.flatten(1))
    seen[3, 1] = 29  # its own position is 28
    with pytest.raises(RuntimeError, match="impossible size"):
        tape.run([(begin, q.flatten(1)), (chosen, seen)], where, layers, ids, out)


def test_an_expert_moves_between_two_steps(path: str) -> None:
    """Its old place is then wiped: a tape, and the experts themselves, read the new one."""
    model, chosen = small_model(torch.float32)
    experts, x, where = model["experts"], random(40, 20), places([40], [40])
    ids = torch.arange(80).view(1, 40, 2) % 8

    def run(rows: Operations[Value], x: Value) -> Value:
        weights = rows.route(0, rows.linear(model["gate"], x), replace(chosen, hashed=True))
        return rows.experts(0, experts, x, weights)

    tape = Tape(torch.float32)
    begin = tape.value(20)
    end: Operand = run(tape, begin)
    steps: list[Callable[[], Tensor]] = [lambda: run(Eager(where, [], ids.clone()), x[:, None]).flatten(1)]
    if path != "plain":
        steps.append(lambda: tape.run([(begin, x)], where, [], ids.clone(), end))
    before = [step() for step in steps]
    for expert in (0, 5):
        there = [part[expert].clone() for part in (experts.gate_up, experts.down)]
        experts.move(expert, *there)
        experts.gate_up[expert], experts.down[expert] = 0, 0
    assert all(torch.equal(step(), old) for step, old in zip(steps, before, strict=True))
    assert before[0].abs().sum(1).all()
    with pytest.raises(ValueError, match="contiguous bytes"):
        experts.move(1, experts.gate_up[1, :, 1:], experts.down[1])


def test_an_expert_without_an_address_is_refused_where_it_is_chosen(path: str) -> None:
    if path == "plain":
        pytest.skip("only kernels read addresses")
    for part in (0, 1):
        experts, x, weights = small_model(torch.float32)[0]["experts"], random(3, 20), torch.ones(3, 2)
        experts.addresses[part, 6] = 0
        assert experts(x, torch.tensor([[0, 1], [2, 8], [3, 7]]), weights).isfinite().all()
        with pytest.raises(RuntimeError, match="has no address"):
            experts(x, torch.tensor([[0, 1], [2, 6], [3, 7]]), weights)


def test_caches_that_do_not_fit_are_refused(path: str) -> None:
    if path == "plain":
        pytest.skip("indexing itself refuses")
    tape = Tape(torch.bfloat16)
    begin = tape.value(12)
    tape.store(1, "latent", begin)
    where, ids = places([4], [4]), torch.zeros(0, 4, 0, dtype=torch.int64)

    def run(cache: Tensor) -> None:
        tape.run([(begin, torch.zeros(4, 12))], where, [{}, {"latent": cache}], ids, begin)

    run(torch.zeros(1, 64, 12, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="impossible size"):
        run(torch.zeros(1, 64, 13, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="unsupported type"):
        run(torch.zeros(1, 64, 12))
    for bad in (torch.zeros(1, 64, 12, dtype=torch.float16), torch.zeros(1, 32, 12, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="do not fit"):
            run(bad)
    with pytest.raises(KeyError, match="latent"):
        tape.run([(begin, torch.zeros(4, 12))], where, [{}, {}], ids, begin)


def test_values_of_a_wrong_width_are_refused_when_they_are_noted(path: str) -> None:
    tape, (model, _) = Tape(torch.float32), small_model(torch.float32)
    with pytest.raises(ValueError, match="21"):
        tape.linear(model["down"], tape.value(21))
    with pytest.raises(ValueError, match="20"):
        tape.add(tape.value(20), tape.value(21))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"rows": -1}, 2), ({"rows": 2**62}, 2), ({"groups": 2**41}, 2), ({"width": 3}, 2), ({"width": 2**62}, 2),
        ({"out_row": 7}, 2), ({"x_row": 7}, 2), ({"x_row": 2**62}, 2), ({"out_group": 3}, 2), ({"x_group": -4}, 2),
        ({"type": 2}, 1), ({"threads": 0}, 2),
    ],
)  # fmt: skip
def test_hostile_rotations_are_refused(path: str, change: dict[str, int], code: int) -> None:
    kernels = library.load_library()
    if kernels is None:
        pytest.skip("needs the native kernels")
    sizes = {
        "rows": 4, "groups": 2, "width": 4, "out_row": 8, "out_group": 4, "x_row": 8, "x_group": 4, "inverse": 0,
        "type": 0, "threads": 1,
    }  # fmt: skip
    out = torch.full((4, 8), 5.0)
    assert kernels.moestro_rope(*[out.data_ptr()] * 4, *(sizes | change).values()) == code
    assert (out == 5).all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"rows": -1}, 2), ({"rows": 2**62}, 2), ({"num_experts": 0}, 2), ({"num_experts": 2**62}, 2),
        ({"num_groups": 3}, 2), ({"num_groups": 0}, 2), ({"top_k_groups": 5}, 2), ({"top_k_groups": 0}, 2),
        ({"top_k": 5}, 2), ({"top_k": -1}, 2), ({"group_best": 3}, 2), ({"function": 4}, 1), ({"function": -1}, 1),
        ({"given": 1}, 2), ({"threads": 0}, 2),
    ],
)  # fmt: skip
def test_hostile_routers_are_refused(path: str, change: dict[str, int], code: int) -> None:
    kernels = library.load_library()
    if kernels is None:
        pytest.skip("needs the native kernels")
    sizes = {
        "rows": 4, "num_experts": 8, "num_groups": 4, "top_k_groups": 2, "top_k": 2, "scale": 1.0, "function": 0,
        "group_best": 2, "multiply": 0, "normalize": 1, "given": 0, "threads": 1,
    }  # fmt: skip
    ids, weights, logits = torch.full((4, 2), 8), torch.full((4, 2), 5.0), torch.zeros(4, 8)
    where = [t.data_ptr() for t in (ids, weights, logits, logits)]
    assert kernels.moestro_route(*where, *(sizes | change).values()) == code
    assert (ids == 8).all() and (weights == 5).all()


# on memory of 256 bytes a row, two caches of one page of 16 and 12 values a row, two routers: each reaches beyond one
@pytest.mark.parametrize(
    "code",
    [
        *([99], [-1], [4, 0]),  # no operation, or one without its operands
        *([0, 0, 0, 0, 1, 2**59, 4, 0, 0], [1, 0, 0, 0, 5, 0, 0, 1, 4, 4, 0, 0], [3, 0, 250, 0, 16, 0, 0, 0]),
        *([2, 0, 0, 3, 1, 8, 8, 1, 0, 0, 0, -1, 0], [2, 0, 0, -1, 1, 8, 8, 1, 0, 0, 0, -1, 0]),
        *([2, 0, 0, 0, 1, 8, 8, 1, 0, 0, 1, -1, 0], [2, 0, 0, 1, 1, 13, 8, 1, 0, 0, 0, -1, 0]),
        *([2, 0, 0, 0, 1, 8, 8, 1, 0, 0, 0, 256, 4], [2, 0, 0, 0, 1, 8, 8, 1, 0, 0, 0, -2, 4]),
        *([2, 0, 0, 0, 1, 8, 8, 1, 0, 0, 0, 64, 0], [2, 0, 0, 0, 1, 8, 8, 1, 0, 0, 0, 64, 2]),
        *([4, 0, 200, 16, 0], [4, 0, 0, 16, 7], [5, 0, 64, 128, 999, 0]),
        *([5, 250, 0, 0, 16, 0], [5, -64, 0, 0, 16, 0], [5, 0, 0, 0, 2**60, 0], [6, 0, 0, 16, 12, 1, 4, 8, 0]),
        *([6, 0, 0, 16, 0, 2**50, 4, 8, 0], [6, 0, 0, 16, 0, 1, 4, 4, 0], [7, 0, 64, 0, 0, 64, 64, 1, 0, 1, 64]),
        *([7, 0, 64, 0, 0, 64, 64, 0, 60, 2, 8], [7, 0, 64, 0, 0, 64, 64, 0, 0, -1, 8]),
        *([7, 0, 64, 0, 0, 64, 64, -1, 0, 1, 8], [7, 0, 64, 2**61, 0, 64, 64, 0, 0, 1, 8]),
        *([7, 0, 300, 0, 0, 0, 64, 0, 0, 1, 8], [9, 0, 224, 64]),
        *([8, 2, 0, 16, 0, 0], [8, -1, 0, 16, 0, 0], [8, 0, 240, 16, 0, 0], [8, 0, 0, 12, 0, 0]),
        *([8, 1, 0, 16, 0, 0], [8, 0, 0, 16, 0, 1], [8, 0, 0, 16, 0], [8, 0, 0, 2**62, 0, 0]),
        [10, 2, 0, 0, 0, 8, 1, 1, 0, 0, 1, 0, 0, 0],
    ],
)
def test_hostile_programs_are_refused(path: str, code: list[int]) -> None:
    kernels = library.load_library()
    if kernels is None:
        pytest.skip("needs the native kernels")
    memory, where = torch.full((4 * 64,), 5.0), places([4], [4])
    cache, ids = [torch.full((1, 64, width), 5.0) for width in (16, 12)], torch.full((2, 4, 2), 7)
    pages = (Cache * 2)(*(Cache(one.data_ptr(), one.shape[2], 0) for one in cache))
    sines = torch.zeros(4, 4)
    step = Step(
        memory.data_ptr(), ids.data_ptr(), ctypes.addressof(pages), sines.data_ptr(), sines.data_ptr(),
        *(t.data_ptr() for t in (where.slots, where.starts, where.first, where.tables)),
        4, 256, 2, 2, 2, 1, 4, 1, 1, 1,
    )  # fmt: skip
    program = array.array("q", code)
    assert kernels.moestro_run(program.buffer_info()[0], len(program), ctypes.addressof(step)) in (1, 2)
    assert (memory == 5).all() and all((one == 5).all() for one in cache) and (ids == 7).all()


def test_slots_outside_of_the_cache_are_refused(path: str) -> None:
    if path == "plain":
        pytest.skip("indexing itself refuses")
    tape = Tape(torch.float32)
    begin = tape.value(12)
    tape.store(0, "kv", begin)
    where, ids = places([4], [4]), torch.zeros(0, 4, 0, dtype=torch.int64)
    for bad in (-1, 64):
        where.slots[2] = bad
        with pytest.raises(RuntimeError, match="impossible size"):
            tape.run([(begin, torch.zeros(4, 12))], where, [{"kv": torch.zeros(1, 64, 12)}], ids, begin)
