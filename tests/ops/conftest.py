"""Fixtures of kernel tests: each instruction set in turn, two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import runnable

from moestro.ops import native


@pytest.fixture(params=runnable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    library = native.load_library()
    assert library is not None
    best = native.current_isa()
    assert library.moestro_set_isa(request.param.encode()) == 0
    yield request.param
    library.moestro_set_isa(best.encode())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the machine has, so that tasks are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
