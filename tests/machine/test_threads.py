"""How many threads may compute, from made-up control groups whose answer is known; which OpenMP runtimes are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from system import write

from moestro import machine


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


def test_threads_follow_the_user_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert machine.usable_threads() == 3
    for nothing in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert machine.usable_threads() == machine.usable_cores()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_usable_cores_follow_the_affinity() -> None:
    """In a process of its own, bound to one core."""
    code = (
        "import os\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from moestro import machine\n"
        "print(machine.usable_cores())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_quota_below_the_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.machine.threads.cpu_quota", lambda *_: 1.5)
    assert machine.usable_cores() == 1
    monkeypatch.setattr("moestro.machine.threads.cpu_quota", lambda *_: 0.2)
    assert machine.usable_cores() == 1


def test_use_threads_sets_what_torch_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        assert machine.use_threads(2) == torch.get_num_threads() == 2
        assert machine.use_threads() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="the copy is made of a library that Linux names")
def test_two_copies_of_openmp_are_told_apart(tmp_path: Path) -> None:
    """In a process of its own, because a library once loaded stays. The user's environment is left alone."""
    code = (
        "import ctypes, os, shutil, sys, torch\n"
        "from moestro import machine\n"
        "(own,) = machine.loaded_openmp()\n"
        "copy = shutil.copy(own, sys.argv[1])\n"
        "ctypes.CDLL(copy)\n"
        "assert machine.loaded_openmp() == tuple(sorted((own, copy))), machine.loaded_openmp()\n"
        "assert 'KMP_DUPLICATE_LIB_OK' not in os.environ\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "KMP_DUPLICATE_LIB_OK"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
