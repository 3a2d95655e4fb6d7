"""`moestro.train` and `moestro.load` leave the program that calls them as it was: threads, allocator, environment."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moestro
from moestro import machine
from moestro.config import Config

THREADS = 3  # neither the default here nor what the configuration asks for


def thread_variables() -> dict[str, str]:
    """What environment variables say of threads; torch sets some of its own."""
    return {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_", "MKL_", "MALLOC_"))}


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """The caller's own number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def libc_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions of the C library that `machine` calls, none of which takes effect."""
    calls: list[str] = []

    class Libc:
        def __init__(self, name: str | None) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., int]:
            def function(*arguments: object) -> int:
                calls.append(name)
                return 1

            return function

    types = {name: getattr(ctypes, name) for name in ("c_int", "c_size_t")}
    monkeypatch.setattr("moestro.machine.memory.ctypes", SimpleNamespace(CDLL=Libc, **types))
    monkeypatch.setattr("moestro.machine.memory.platform.libc_ver", lambda: ("glibc", "2.36"))
    return calls


def test_the_spy_sees_mallopt(libc_calls: list[str]) -> None:
    assert machine.keep_freed_memory()
    assert libc_calls == ["mallopt", "mallopt"]


def test_training_changes_neither_threads_nor_malloc(
    make_config: Callable[..., Config], tmp_path: Path, libc_calls: list[str]
) -> None:
    environment = thread_variables()
    moestro.train(make_config("train.steps=2", "train.threads=1"), tmp_path / "run", quiet=True)
    assert torch.get_num_threads() == THREADS
    assert "mallopt" not in libc_calls
    assert thread_variables() == environment


def test_loading_and_generating_change_neither_threads_nor_malloc(tiny_run: Path, libc_calls: list[str]) -> None:
    environment = thread_variables()
    assert moestro.load(tiny_run).generate("the cat", max_tokens=3).ids
    assert torch.get_num_threads() == THREADS
    assert "malloc_trim" in libc_calls and "mallopt" not in libc_calls
    assert thread_variables() == environment
