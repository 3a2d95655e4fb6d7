"""What the machine is said to have, and what is said to be wrong with it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from moestro import machine
from moestro.machine import Machine

HEALTHY = Machine(
    os="Linux 6 x86_64",
    python="3.11.7",
    torch="2.13.0+cpu",
    cpu="a CPU",
    cores=2,
    threads=2,
    instruction_sets=("avx2", "avx512_bf16"),
    memory_gib=16.0,
    available_gib=8.0,
    gpus=(),
    openmp=("/lib/libgomp.so.1",),
)


def test_a_healthy_machine_has_no_problems() -> None:
    assert HEALTHY.problems() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"openmp": ("/a/libgomp.so.1", "/b/libiomp5.so")}, "/b/libiomp5.so"),
        ({"threads": 8}, "OMP_NUM_THREADS=2"),
        ({"instruction_sets": ("avx2", "fma")}, "no bf16"),
        ({"available_gib": 0.5}, "0.5 GiB"),
        ({"torch": "2.5.1"}, "torch>=2.6"),
        ({"torch": "1.13.0a0+git"}, "torch>=2.6"),
    ],
)
def test_every_problem_is_one_line_that_names_the_remedy(change: dict[str, Any], expected: str) -> None:
    (problem,) = dataclasses.replace(HEALTHY, **change).problems()
    assert expected in problem
    assert "\n" not in problem


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bf16_needs_an_instruction(name: str) -> None:
    assert dataclasses.replace(HEALTHY, instruction_sets=("avx2", name)).bf16_is_fast
    assert not dataclasses.replace(HEALTHY, instruction_sets=("avx2", "avx512_fp16")).bf16_is_fast


def test_description_agrees_with_the_system() -> None:
    import torch

    found = machine.describe_machine()
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert 0 < found.available_gib <= found.memory_gib
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "avx2" in found.instruction_sets
