"""What the machine offers, read from made-up system files whose answers are known, and from this machine."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moestro import machine
from moestro.machine import Machine, Measurement

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


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_quota_is_the_least_on_the_way_up_v2(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "0::/outer/inner\n",
            "fs/outer/inner/cpu.max": "max 100000\n",
            "fs/outer/cpu.max": "150000 100000\n",
            "fs/cpu.max": "400000 100000\n",
        },
    )
    assert machine.cpu_quota(tmp_path / "membership", tmp_path / "fs") == 1.5


def test_quota_of_a_container_whose_own_group_is_not_visible_v1(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n",
            "fs/cpu/cpu.cfs_quota_us": "300000\n",
            "fs/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert machine.cpu_quota(tmp_path / "membership", tmp_path / "fs") == 3.0


@pytest.mark.parametrize("text", ["max 100000\n", ""])
def test_no_quota(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"membership": "0::/\n", "fs/cpu.max": text, "v1/cpu/cpu.cfs_quota_us": "-1\n"})
    assert machine.cpu_quota(tmp_path / "membership", tmp_path / "fs") is None
    assert machine.cpu_quota(tmp_path / "membership", tmp_path / "v1") is None
    assert machine.cpu_quota(tmp_path / "absent", tmp_path / "fs") is None


def test_memory_limit_counts_file_pages_as_free(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "0::/job\n",
            "fs/job/memory.max": "1000\n",
            "fs/job/memory.current": "700\n",
            "fs/job/memory.stat": "anon 400\ninactive_file 250\n",
            "fs/memory.max": "max\n",
        },
    )
    assert machine.memory_limit(tmp_path / "membership", tmp_path / "fs") == (1000, 550)


def test_memory_limit_v1_takes_the_hierarchical_count(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "3:memory:/job\n",
            "fs/memory/job/memory.limit_in_bytes": "1000\n",
            "fs/memory/job/memory.usage_in_bytes": "900\n",
            "fs/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
        },
    )
    assert machine.memory_limit(tmp_path / "membership", tmp_path / "fs") == (1000, 400)


def test_two_copies_of_openmp_are_told_apart(tmp_path: Path) -> None:
    line = "7f00-7f01 r-xp 00000000 00:00 1    {}\n"
    names = [
        "/a/libgomp.so.1",
        "/a/libgomp.so.1",
        "/b/libgomp-a34b.so.1.0.0",
        "/c/libiomp5.so",
        "/d/libompi.so",
    ]
    write(tmp_path, {"maps": "".join(line.format(name) for name in names)})
    found = machine.loaded_openmp(tmp_path / "maps")
    assert found == ("/a/libgomp.so.1", "/b/libgomp-a34b.so.1.0.0", "/c/libiomp5.so")


def test_threads_follow_the_user_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert machine.usable_threads() == 3
    for nothing in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert machine.usable_threads() == machine.usable_cores()


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


def test_measured_bf16_overrules_the_flag() -> None:
    slow = Measurement(2, 20.0, 1.0, True, fp32_gflops=300.0, bf16_gflops=150.0, seconds=3.0)
    assert slow.bf16_speedup == 0.5
    (advice,) = slow.problems()
    assert "0.50" in advice
    assert "train.dtype=fp32" in advice
    assert dataclasses.replace(slow, bf16_gflops=600.0).problems() == []


def test_description_agrees_with_the_system() -> None:
    import torch

    found = machine.describe_machine()
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert 0 < found.available_gib <= found.memory_gib
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "avx2" in found.instruction_sets


def test_measurement_is_plausible() -> None:
    found = machine.measure_machine(seconds=0.2)
    assert min(found.read_gb_per_second, found.fp32_gflops, found.bf16_gflops) > 0.01


def test_process_memory_is_below_its_peak() -> None:
    assert 0 < machine.process_memory_gib() <= machine.peak_memory_gib() * 1.01


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted as Linux counts them")
def test_kept_memory_is_not_faulted_in_again() -> None:
    """In a process of its own, because the setting lasts: the second block reuses the pages of the first."""
    code = (
        "import resource, sys\n"
        "from moestro.machine import keep_freed_memory\n"
        "took_effect = keep_freed_memory() if sys.argv[1] == 'keep' else True\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    block = b'x' * 2**26\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "print(int(took_effect), faults())\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True)
        for mode in ("keep", "default")
    ]
    (took_effect, kept), (_, default) = (map(int, run.stdout.split()) for run in runs)
    if not took_effect:
        pytest.skip("not glibc, or one that refuses the threshold")
    assert kept * 10 < default


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
def test_freed_memory_is_returned() -> None:
    """In a process of its own, whose heap nothing else has used: the last block keeps the others' room."""
    code = (
        "import resource\n"
        "from moestro import machine\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "blocks = [b'x' * 100_000 for _ in range(1000)]\n"
        "del blocks[:-1]\n"
        "before = resident()\n"
        "machine.return_freed_memory()\n"
        "print(before - resident())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    assert int(done.stdout) > 90e6
