"""Measures this machine: memory bandwidth and matrix products.

Figures are the best of several runs, as limits to compare with; on a shared machine they are too low.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.machine.memory import GIB, memory_bytes
from moestro.machine.system_files import read_text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measurement:
    """What `threads` threads reached: bandwidth in GB/s, matrix products in GFLOP/s."""

    threads: int
    read_gb_per_second: float
    read_buffer_gib: float
    read_buffer_exceeds_cache: bool
    fp32_gflops: float
    bf16_gflops: float
    seconds: float

    @property
    def bf16_speedup(self) -> float:
        """Rate of bf16 products divided by that of fp32; below 1, bf16 saves memory but costs time."""
        return self.bf16_gflops / self.fp32_gflops

    def problems(self) -> list[str]:
        """What the figures advise, one line each; empty when there is nothing to say."""
        found = []
        if self.bf16_speedup < 1:
            found.append(
                f"bf16 products reach {self.bf16_speedup:.2f} times the rate of fp32; train.precision=fp32 is faster"
            )
        if not self.read_buffer_exceeds_cache:
            found.append("too little free memory to read past the caches; the bandwidth shown is too high")
        return found


def measure_machine(seconds: float = 3.0, most_bytes: int = 4 * GIB) -> Measurement:
    """Measure memory bandwidth and matrix products within about `seconds`, with torch's current threads.

    Bandwidth is that of reading a buffer of at most `most_bytes`; filling it first takes time, too.
    """
    import torch

    start = time.perf_counter()
    read, buffer_bytes = _measure_read(seconds / 4, most_bytes)
    fp32 = _measure_product(torch.float32, seconds / 4)
    bf16 = _measure_product(torch.bfloat16, seconds / 4)
    return Measurement(
        threads=torch.get_num_threads(),
        read_gb_per_second=read / 1e9,
        read_buffer_gib=buffer_bytes / GIB,
        read_buffer_exceeds_cache=buffer_bytes >= 2 * last_cache_bytes(),
        fp32_gflops=fp32 / 1e9,
        bf16_gflops=bf16 / 1e9,
        seconds=time.perf_counter() - start,
    )


def _measure_read(budget: float, most_bytes: int) -> tuple[float, int]:
    """Best bytes per second of summing a buffer meant to exceed every cache, and the buffer's bytes."""
    import torch

    available = memory_bytes()[1]
    size = min(max(GIB, 4 * last_cache_bytes()), max(available // 4, 64 * 2**20), most_bytes)
    buffer = torch.ones(size // 4)  # filled, because untouched pages would cost faults, not reads
    return size / _best_seconds(lambda: torch.sum(buffer), budget), size


def _measure_product(dtype: torch.dtype, budget: float) -> float:
    """Best operations per second of a square matrix product, the largest up to 2048 that fits the budget."""
    import torch

    best = 0.0
    for size in (256, 512, 1024, 2048):
        a, b = torch.ones(2, size, size, dtype=dtype)
        out = torch.empty_like(a)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> object:
            return torch.mm(a, b, out=out)

        seconds = _best_seconds(multiply, budget / 4)
        best = max(best, 2 * size**3 / seconds)
        if 8 * seconds > budget / 2:
            break
    return best


def _best_seconds(work: Callable[[], object], budget: float) -> float:
    """The shortest time of one call, over a warm-up call and as many more as fit the budget, at least one."""
    work()
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def last_cache_bytes() -> int:
    """Size of the first core's largest cache; 32 MiB if the system does not say."""
    texts = [read_text(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes = [int(text.strip()[:-1]) * 1024 for text in texts if text.strip().endswith("K")]
    return max(sizes, default=32 * 2**20)
