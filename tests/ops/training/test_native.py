"""The compiled kernels against plain torch in fp64: every instruction set of this CPU, awkward and hostile sizes.

Bounds: a sum of K products in fp32 errs by at most about K·eps·Σ|a||b|; inputs and outputs in bf16 add 2⁻⁸ each way.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from by_form import by_kernels
from instruction_sets import runnable
from torch import Tensor

from moestro import ops
from moestro.ops import library
from moestro.ops.training import native, reference

pytestmark = [
    pytest.mark.skipif(library.load_library() is None, reason="the native kernels are not built"),
    pytest.mark.usefixtures("two_threads"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIZES = [
    (1, 1, 1),
    (7, 65, 3),
    (6, 64, 512),
    (100, 130, 77),
    (97, 33, 1025),
    (5, 200, 0),
    (0, 3, 4),
    (3, 0, 4),
    (13, 600, 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_matmul_stays_within_the_bound(isa: str, dtype: torch.dtype, transposed: tuple[bool, bool]) -> None:
    for m, n, k in SIZES:
        a = random(*((k, m) if transposed[0] else (m, k))).to(dtype)
        b = random(*((n, k) if transposed[1] else (k, n)), seed=1).to(dtype)
        out = native.matmul(a, b, a_transposed=transposed[0], b_transposed=transposed[1])
        exact_a, exact_b = (t.double().T if turn else t.double() for t, turn in zip((a, b), transposed, strict=True))
        bound = (k + 2) * 2.0**-24 * (exact_a.abs() @ exact_b.abs())
        if dtype == torch.bfloat16:
            bound += 2.0**-8 * (exact_a @ exact_b).abs()
        assert bool(((out.double() - exact_a @ exact_b).abs() <= bound + 1e-30).all()), (m, n, k)


def test_matmul_reads_slices_of_larger_matrices(isa: str) -> None:
    a, b = random(40, 50)[3:20, 7:30], random(60, 70, seed=1)[2:25, 5:66]
    torch.testing.assert_close(native.matmul(a, b), a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(isa: str, dtype: torch.dtype) -> None:
    a, b = random(130, 300).to(dtype), random(90, 300, seed=1).to(dtype)
    together = native.matmul(a, b, b_transposed=True)
    for rows in (slice(0, 1), slice(5, 7), slice(40, 129)):
        assert torch.equal(native.matmul(a[rows], b, b_transposed=True), together[rows])


def expert_inputs(loads: list[int], hidden: int, width: int, dtype: torch.dtype, top_k: int = 2) -> list[Tensor]:
    """x, gate_up, down, ids, weights with about the given shares of choices; id len(loads) is not carried out."""
    num_experts, tokens = len(loads) - 1, 37
    generator = torch.Generator().manual_seed(3)
    ids = torch.multinomial(
        torch.tensor(loads, dtype=torch.float), tokens * top_k, replacement=True, generator=generator
    )
    gate_up = random(num_experts, 2 * width, hidden, seed=4) / hidden**0.5
    down = random(num_experts, hidden, width, seed=5) / width**0.5
    weights = torch.rand(tokens, top_k, generator=generator)
    return [
        random(tokens, hidden, seed=6).to(dtype),
        gate_up.to(dtype),
        down.to(dtype),
        ids.view(tokens, top_k),
        weights,
    ]


def forward_backward(function: object, inputs: list[Tensor]) -> list[Tensor]:
    x, gate_up, down, ids, weights = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate_up, down, weights)]
    out = function(leaves[0], leaves[1], leaves[2], ids, leaves[3])  # type: ignore[operator]
    grad = random(*out.shape, seed=7).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 4), (33, 17), (64, 48), (100, 70)])
@pytest.mark.parametrize("loads", [[1, 1, 1, 1, 0], [0, 5, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
def test_experts_equal_the_reference(isa: str, dtype: torch.dtype, shape: tuple[int, int], loads: list[int]) -> None:
    inputs = expert_inputs(loads, *shape, dtype)
    exact = forward_backward(reference.grouped_experts, [t.double() if t.is_floating_point() else t for t in inputs])
    close = 1e-5 if dtype == torch.float32 else 0.02
    for ours, theirs in zip(forward_backward(by_kernels.grouped_experts, inputs), exact, strict=True):
        assert float((ours.double() - theirs).norm()) <= close * float(theirs.norm()) + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    inputs = expert_inputs([1, 6, 1, 2, 1], 40, 24, dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(forward_backward(by_kernels.grouped_experts, inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_does_not_depend_on_its_batch(isa: str) -> None:
    x, gate_up, down, ids, weights = expert_inputs([1, 1, 1, 1, 0], 32, 16, torch.bfloat16)
    together = by_kernels.grouped_experts(x, gate_up, down, ids, weights)
    for rows in (slice(0, 1), slice(3, 9)):
        alone = by_kernels.grouped_experts(x[rows], gate_up, down, ids[rows], weights[rows])
        assert torch.equal(alone, together[rows])


def test_no_tokens(isa: str) -> None:
    x, gate_up, down, ids, weights = expert_inputs([1, 1, 0], 8, 4, torch.float32)
    out = forward_backward(by_kernels.grouped_experts, [x[:0], gate_up, down, ids[:0], weights[:0]])
    assert out[0].shape == (0, 8)
    assert not out[2].any() and not out[3].any()


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float64, 37), (torch.float32, 3)], ids=["fp64", "few"])
def test_what_the_kernels_do_not_take_goes_another_way(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int
) -> None:
    monkeypatch.setattr(native, "experts_forward", lambda *arguments: pytest.fail("the kernels were called"))
    x, gate_up, down, ids, weights = expert_inputs([1, 1, 0], 8, 4, torch.float32)
    inputs = [x[:tokens].to(dtype), gate_up.to(dtype), down.to(dtype), ids[:tokens], weights[:tokens].to(dtype)]
    exact = forward_backward(reference.grouped_experts, inputs)
    for ours, theirs in zip(forward_backward(ops.grouped_experts, inputs), exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_enough_tokens_go_to_the_kernels() -> None:
    inputs = expert_inputs([1, 1, 0], 8, 4, torch.float32)
    assert torch.equal(ops.grouped_experts(*inputs), by_kernels.grouped_experts(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_lie_apart_give_the_bits_of_a_stack(isa: str, dtype: torch.dtype) -> None:
    x, gate_up, down, ids, weights = expert_inputs([1, 6, 0, 2, 1], 33, 17, dtype)
    grad, choices = random(*x.shape, seed=7).to(dtype), weights.requires_grad_()
    stacks = [gate_up.requires_grad_(), down.requires_grad_()]
    apart = [[m.detach().clone().requires_grad_() for m in stack.unbind()] for stack in stacks]
    whole = by_kernels.grouped_experts(x, *stacks, ids, choices)
    pieces = by_kernels.grouped_experts(x, *apart, ids, choices)
    assert torch.equal(pieces, whole)
    expected = torch.autograd.grad(whole, [*stacks, choices], grad)
    *matrices, by_choice = torch.autograd.grad(pieces, [*apart[0], *apart[1], choices], grad)
    assert torch.equal(torch.stack(matrices[:4]), expected[0]) and torch.equal(torch.stack(matrices[4:]), expected[1])
    assert torch.equal(by_choice, expected[2])
    few = (x[:2], *apart, ids[:2], choices[:2])  # go to plain torch
    torch.testing.assert_close(ops.grouped_experts(*few), pieces[:2], rtol=0.02, atol=0.02)


def test_experts_of_other_shapes_are_refused() -> None:
    x, gate_up, down, ids, weights = expert_inputs([1, 1, 0], 8, 4, torch.float32)
    for wrong in (gate_up[:, :7], gate_up[..., :7], gate_up[:1], [gate_up[0], gate_up[1, :7]], [gate_up[0], gate_up]):
        with pytest.raises(ValueError, match=r"experts of|matrices of"):
            by_kernels.grouped_experts(x, wrong, down if isinstance(wrong, Tensor) else list(down), ids, weights)


def test_an_expert_without_an_address_is_refused_where_it_has_choices(isa: str) -> None:
    x, gate_up, down, _, _ = expert_inputs([1, 1, 0], 8, 4, torch.float32)
    y, h, weights, token = torch.full((2, 8), 5.0), torch.full((2, 8), 5.0), torch.ones(2), torch.tensor([0, 1])
    d_weights, gradients = torch.full((2,), 5.0), [torch.full_like(gate_up, 5.0), torch.full_like(down, 5.0)]

    def compute(missing: list[tuple[int, int]], offsets: list[int]) -> None:
        tables = torch.tensor([[m.data_ptr() for m in part] for part in (gate_up, down, *gradients)])
        for part, expert in missing:
            tables[part, expert] = 0
        rest = (token, weights, torch.tensor(offsets), 2, len(x), 8, 4, 0, 1)
        if not any(part > 1 for part, _ in missing):
            library.call("moestro_experts_forward", y, h, x, *tables[:2], *rest)
        library.call("moestro_experts_backward", y, d_weights, *tables[2:], x, x, h, *tables[:2], *rest)

    for part, expert, offsets in ((0, 0, [0, 2, 2]), (1, 1, [0, 1, 2]), (2, 1, [0, 2, 2]), (3, 0, [0, 1, 2])):
        with pytest.raises(RuntimeError, match="has no address"):
            compute([(part, expert)], offsets)
        assert all(bool((t == 5).all()) for t in (y, h, d_weights, *gradients))
    compute([(0, 1), (1, 1)], [0, 2, 2])
    assert not gradients[0][1].any() and not gradients[1][1].any()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"m": -1}, 2), ({"m": 2**62}, 2), ({"n": 2**41, "out": 2**41, "b": 2**41}, 2), ({"a": 3}, 2),
        ({"out": 1}, 2), ({"threads": 0}, 2), ({"type": 7}, 1), ({"type": -1}, 1),
    ],
)  # fmt: skip
def test_hostile_sizes_are_refused(change: dict[str, int], code: int) -> None:
    kernels = library.load_library()
    assert kernels is not None
    sizes = {"m": 4, "n": 4, "k": 4, "out": 4, "a": 4, "b": 4, "ta": 0, "tb": 0, "type": 0, "out_type": 0, "threads": 1}
    out = torch.full((4, 4), 5.0)
    found = kernels.moestro_matmul(out.data_ptr(), out.data_ptr(), out.data_ptr(), *(sizes | change).values())
    assert found == code
    assert bool((out == 5.0).all())


@pytest.mark.parametrize(
    ("token", "offsets"), [([0, 9], [0, 1, 2]), ([0, -1], [0, 1, 2]), ([0, 1], [0, 2, 1]), ([0, 1], [1, 1, 2])]
)
def test_hostile_indices_are_refused(token: list[int], offsets: list[int]) -> None:
    x, gate_up, down, _, _ = expert_inputs([1, 1, 0], 8, 4, torch.float32)
    y, h, weights = torch.empty(2, 8), torch.empty(2, 8), torch.ones(2)
    where = (torch.tensor(token), weights, torch.tensor(offsets))
    tables = (torch.tensor([m.data_ptr() for m in part]) for part in (gate_up, down))
    with pytest.raises(RuntimeError, match="impossible size"):
        library.call("moestro_experts_forward", y, h, x[:9], *tables, *where, 2, 9, 8, 4, 0, 1)


def test_a_forced_instruction_set_is_used_or_refused() -> None:
    def ask(name: str) -> subprocess.CompletedProcess[str]:
        code = "from moestro.ops import library; print(library.current_isa())"
        return subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"MOESTRO_ISA": name}, capture_output=True, text=True
        )

    assert ask(runnable()[0]).stdout.strip() == runnable()[0]
    assert "MOESTRO_ISA=avx9" in ask("avx9").stderr


def test_an_unknown_wish_for_operations_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import moestro.ops"], env=os.environ | {"MOESTRO_OPS": "refrence"}, capture_output=True
    )
    assert b"MOESTRO_OPS=refrence is neither reference nor fused" in done.stderr
