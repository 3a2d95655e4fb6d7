"""How many threads this process should compute with, and which OpenMP runtimes it has loaded.

Limits are those of this process, not of the hardware: CPU affinity and control groups (v1 and v2) count, because a
container that sees 64 cores and may use 2 is slowest with 64 threads.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from moestro.machine.system_files import MEMBERSHIP, ROOT, control_groups, read_text


def use_threads(threads: int = 0) -> int:
    """Compute with this many threads from now on, 0 for `usable_threads()`; returns the number. Imports torch.

    This is torch's own setting and holds for the whole process. Commands call it first; a program that uses Moestro as
    a library decides for itself.
    """
    import torch

    threads = threads or usable_threads()
    torch.set_num_threads(threads)
    return threads


def usable_threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS if the user set it, else every usable core."""
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wish) if wish.isdigit() and int(wish) > 0 else usable_cores()


def usable_cores() -> int:
    """Cores this process may use: its CPU affinity, or the quota of its control groups if that is lower."""
    process = psutil.Process()
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # macOS has none
    quota = cpu_quota(MEMBERSHIP, ROOT)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(membership: Path, root: Path) -> float | None:
    """CPU seconds per second that the control groups grant, the least of all up to the root; None: no limit."""
    quotas = []
    for folder in control_groups(membership, root, "cpu"):
        words = read_text(folder / "cpu.max").split()
        if not words:
            words = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        quotas += [int(words[0]) / int(words[1])] if all(word.isdigit() for word in words) else []
    return min(quotas, default=None)


def loaded_openmp() -> tuple[str, ...]:
    """Files of the OpenMP runtimes loaded in this process."""
    wish = os.environ.get("KMP_DUPLICATE_LIB_OK")
    from threadpoolctl import threadpool_info

    if wish is None:  # importing threadpoolctl sets it, but that is the user's decision
        os.environ.pop("KMP_DUPLICATE_LIB_OK", None)
    return tuple(sorted({library["filepath"] for library in threadpool_info() if library["user_api"] == "openmp"}))
