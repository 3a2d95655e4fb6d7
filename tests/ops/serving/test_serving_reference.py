"""The parts of the plain serving path: right values, and rows that depend on nothing but themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops.serving import reference

SLICES = (slice(0, 1), slice(5, 12), slice(31, 800), slice(1199, 1200))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("function", [torch.sigmoid, torch.exp, F.silu, F.softplus])
@pytest.mark.parametrize("width", [1, 7, 37, 64])
def test_activations_do_not_depend_on_the_place(function: reference.Elementwise, width: int) -> None:
    x = random(1200, width) * 4
    whole = reference.activate(function, x)
    torch.testing.assert_close(whole, function(x))
    for rows in SLICES:
        assert torch.equal(reference.activate(function, x[rows]), whole[rows])


@pytest.mark.parametrize("width", [1, 2, 37, 64, 65])
def test_sums_do_not_depend_on_the_place(width: int) -> None:
    x = random(1200, width)
    whole = reference.sum_rows(x)
    torch.testing.assert_close(whole, x.double().sum(-1, keepdim=True).float(), rtol=1e-5, atol=1e-5)
    for rows in SLICES:
        assert torch.equal(reference.sum_rows(x[rows]), whole[rows])


@pytest.mark.parametrize("columns", [1, 3])
def test_products_do_not_depend_on_the_place(columns: int) -> None:
    x, tiles = random(1200, 192), random(3, columns, 64, 64, seed=1)
    whole = reference.multiply(x, tiles)
    torch.testing.assert_close(whole, x @ tiles.transpose(1, 2).reshape(192, -1), rtol=1e-4, atol=1e-4)
    for rows in SLICES:
        assert torch.equal(reference.multiply(x[rows], tiles), whole[rows])


def test_nothing_of_nothing() -> None:
    assert reference.activate(torch.exp, torch.empty(0, 3)).shape == (0, 3)
    assert reference.sum_rows(torch.empty(0, 3)).shape == (0, 1)
    assert reference.multiply(torch.empty(0, 64), torch.ones(1, 2, 64, 64)).shape == (0, 128)
