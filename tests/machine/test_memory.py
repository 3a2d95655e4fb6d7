"""Memory as made-up control groups limit it, and what the allocator does with what is freed."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from system import write

from moestro import machine


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


def test_memory_is_what_the_tightest_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.machine import memory

    monkeypatch.setattr(memory, "memory_limit", lambda *_: None)
    total, available = memory.memory_bytes()
    assert 0 < available <= total
    monkeypatch.setattr(memory, "memory_limit", lambda *_: (1000, 400))
    assert memory.memory_bytes() == (1000, 400)
    monkeypatch.setattr(memory, "memory_limit", lambda *_: (2 * total, 2 * total))
    assert memory.memory_bytes()[0] == total


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
