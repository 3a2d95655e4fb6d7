"""Fixtures of kernel tests: each instruction set in turn, plain torch beside them, two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import runnable

from moestro.ops import library


@pytest.fixture(params=runnable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    kernels = library.load_library()
    assert kernels is not None
    best = library.current_isa()
    assert kernels.moestro_set_isa(request.param.encode()) == 0
    yield request.param
    kernels.moestro_set_isa(best.encode())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the machine has, so that tasks are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["plain", *runnable()])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Plain torch, then each instruction set; there two threads, so that tasks are shared out."""
    before, kernels, best = torch.get_num_threads(), library.load_library(), library.current_isa()
    torch.set_num_threads(1 if request.param == "plain" else 2)
    if request.param == "plain":
        monkeypatch.setattr(library, "load_library", lambda: None)
    elif kernels is not None:
        kernels.moestro_set_isa(request.param.encode())
    yield request.param
    if kernels is not None:
        kernels.moestro_set_isa(best.encode())
    torch.set_num_threads(before)
