"""Placements: which slot holds which expert, the tables that follow, and routes mapped to slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro import ops
from moestro.ops import library
from moestro.ops.training import reference
from moestro.routing.placement import Placement, place_routes

# expert 2 has three copies in the first layer, expert 0 in the second
TABLE = torch.tensor([[2, 0, 1, 2, 3, 2], [3, 0, 0, 1, 0, 2]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_tables_of_a_placement() -> None:
    placement = Placement(TABLE, 4)
    assert placement.num_slots == 6
    assert placement.replicas.tolist() == [[1, 1, 3, 1], [3, 1, 1, 1]]
    assert placement.logical_to_physical.tolist() == [
        [[1, -1, -1], [2, -1, -1], [0, 3, 5], [4, -1, -1]],
        [[1, 2, 4], [3, -1, -1], [5, -1, -1], [0, -1, -1]],
    ]


def test_the_tables_invert_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.cat([torch.randperm(16, generator=generator), torch.randint(16, (8,), generator=generator)])]
    placement = Placement(torch.stack([row[torch.randperm(24, generator=generator)] for row in rows * 5]), 16)
    for layer, experts in enumerate(placement.logical_to_physical.tolist()):
        for expert, slots in enumerate(experts):
            held = [slot for slot in slots if slot >= 0]
            assert held == (placement.physical_to_logical[layer] == expert).nonzero()[:, 0].tolist()
            assert len(held) == placement.replicas[layer, expert]


def test_the_identity_changes_nothing() -> None:
    placement, ids = Placement.identity(2, 4), torch.tensor([[0, 3], [4, 1]])
    assert torch.equal(placement.physical_to_logical, torch.tensor([[0, 1, 2, 3]] * 2))
    assert torch.equal(place_routes(ids, placement, 1), ids)
    assert torch.equal(place_routes(ids, placement, 1, choice="in_turn"), ids)


def test_routes_go_to_the_first_copy_or_to_copies_in_turn() -> None:
    placement, ids = Placement(TABLE, 4), torch.tensor([[2, 0], [2, 1], [2, 4], [3, 2], [4, 2]])
    assert place_routes(ids, placement, 0).tolist() == [[0, 1], [0, 2], [0, 6], [4, 0], [6, 0]]
    assert place_routes(ids, placement, 0, choice="in_turn").tolist() == [[0, 1], [3, 2], [5, 6], [4, 0], [6, 3]]
    assert place_routes(ids[:0], placement, 1).shape == (0, 2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE[0], "layers, slots"), (TABLE.int(), "int64"), (TABLE + 1, "outside of 0 to 3"),
        (TABLE - 1, "outside of 0 to 3"), (torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]]), "expert 2 of layer 1"),
    ],
)  # fmt: skip
def test_placements_that_are_none_are_refused(table: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(table, 4)


@pytest.mark.parametrize("choice", ["first", "in_turn"])
@pytest.mark.parametrize("layer", [0, 1])
def test_placed_experts_compute_what_experts_do(choice: str, layer: int) -> None:
    """Forward, and backward with the gradients of an expert's copies added up."""
    placement, tokens = Placement(TABLE, 4), 50
    x, weights = random(tokens, 12).double(), random(tokens, 2, seed=1).double()
    stacks = [random(4, 10, 12, seed=2).double(), random(4, 12, 5, seed=3).double()]
    ids = torch.randint(0, 5, (tokens, 2), generator=torch.Generator().manual_seed(4))
    for experts in (reference.grouped_experts, ops.grouped_experts):
        leaves = [t.clone().requires_grad_() for t in (x, *stacks, weights)]
        plain = experts(leaves[0], leaves[1], leaves[2], ids, leaves[3])
        expected = torch.autograd.grad(plain, leaves, random(tokens, 12, seed=5).double())
        copies = [stack[placement.physical_to_logical[layer]] for stack in stacks]
        leaves = [t.clone().requires_grad_() for t in (x, *copies, weights)]
        slots = place_routes(ids, placement, layer, choice=choice)  # type: ignore[arg-type]
        placed = experts(leaves[0], leaves[1], leaves[2], slots, leaves[3])
        found = torch.autograd.grad(placed, leaves, random(tokens, 12, seed=5).double())
        torch.testing.assert_close(placed, plain)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[3], expected[3])
        for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
            summed = torch.zeros_like(theirs).index_add_(0, placement.physical_to_logical[layer], ours)
            torch.testing.assert_close(summed, theirs)


@pytest.mark.skipif(library.load_library() is None, reason="the native kernels are not built")
def test_copies_that_are_one_tensor_share_its_gradient() -> None:
    """Kernels are given the same address for each copy."""
    placement, x, weights = Placement(TABLE, 4), random(50, 12), random(50, 2, seed=1)
    stacks = [random(4, 10, 12, seed=2).requires_grad_(), random(4, 12, 5, seed=3).requires_grad_()]
    ids = torch.randint(0, 5, (50, 2), generator=torch.Generator().manual_seed(4))
    plain = reference.grouped_experts(x, stacks[0], stacks[1], ids, weights)
    expected = torch.autograd.grad(plain, stacks, random(50, 12, seed=5))
    own = [[matrix.detach().requires_grad_() for matrix in stack.unbind()] for stack in stacks]
    gate_up, down = ([part[e] for e in placement.physical_to_logical[0].tolist()] for part in own)
    slots = place_routes(ids, placement, 0, choice="in_turn")
    placed = ops.grouped_experts(x, gate_up, down, slots, weights)
    torch.testing.assert_close(placed, plain, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(placed, [*own[0], *own[1]], random(50, 12, seed=5))
    for ours, theirs in zip((found[:4], found[4:]), expected, strict=True):
        torch.testing.assert_close(torch.stack(ours), theirs, rtol=1e-4, atol=1e-4)
