"""What this machine has, what it reaches when measured, and what would make it faster: `moestro doctor`.

`describe_machine` only reads (a few milliseconds beside importing torch); `measure_machine` computes for some
seconds. Limits are those of this process, not of the hardware: CPU affinity and control groups (v1 and v2)
count, because a container that sees 64 cores and may use 2 is slowest with 64 threads. Measured figures are
the best of several runs, that is limits to compare with, and on a shared machine they are too low.

Nothing here changes the process, except `keep_freed_memory` and `return_freed_memory`, which say what they do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30

# Worth naming, in the order they are shown: what decides which matrix kernels a CPU can run.
INSTRUCTION_SETS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "svebf16", "sme"),
)
MACOS_NAMES = {
    **{"avx": "hw.optional.avx1_0", "avx2": "hw.optional.avx2_0", "fma": "hw.optional.fma"},
    **{"f16c": "hw.optional.f16c", "avx512f": "hw.optional.avx512f", "asimd": "hw.optional.AdvSIMD"},
    **{"asimddp": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"},
    **{"bf16": "hw.optional.arm.FEAT_BF16", "sme": "hw.optional.arm.FEAT_SME"},
}
FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
OLDEST_TORCH = (2, 6)
LOW_MEMORY_GIB = 2.0

# From glibc's malloc.h. Up to the threshold, blocks come from the heap; above it they are mapped one by one.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
HEAP_BLOCK_BYTES = GIB


@dataclass(frozen=True)
class Machine:
    """The machine as this process may use it. Memory in GiB."""

    os: str
    python: str
    torch: str
    cpu: str
    cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    memory_gib: float
    available_gib: float
    gpus: tuple[str, ...]
    openmp: tuple[str, ...]

    @property
    def bf16_is_fast(self) -> bool:
        """Whether the CPU has bf16 instructions; elsewhere bf16 is emulated and always slower than fp32.

        Necessary, not sufficient: some CPUs with avx512_bf16 multiply bf16 at half the rate of fp32. Only
        measuring tells, see `training/precision.py`.
        """
        return not FAST_BF16.isdisjoint(self.instruction_sets)

    def problems(self) -> list[str]:
        """What costs speed or correctness here, one line each with what to do; empty when all is well."""
        found = []
        if len(self.openmp) > 1:
            found.append(
                f"{len(self.openmp)} OpenMP runtimes are loaded ({', '.join(self.openmp)}): they compete for "
                "cores and can deadlock; import torch first, or remove the package that brings the other one"
            )
        if self.threads > self.cores:
            found.append(
                f"torch uses {self.threads} threads on {self.cores} usable cores; set OMP_NUM_THREADS={self.cores}"
            )
        if not self.bf16_is_fast:
            found.append("this CPU has no bf16 instructions, so torch's own bf16 is slow; leave train.dtype at auto")
        if self.available_gib < LOW_MEMORY_GIB:
            found.append(
                f"only {self.available_gib:.1f} GiB of memory are free; close other programs, or lower train.batch_size"
            )
        if _version_pair(self.torch) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            found.append(f"torch {self.torch} is too old; pip install 'torch>={oldest}'")
        return found


@dataclass(frozen=True)
class Measurement:
    """What was reached with `threads` threads: bandwidth in GB/s, matrix products in GFLOP/s."""

    threads: int
    read_gb_per_second: float
    read_buffer_gib: float
    read_buffer_exceeds_cache: bool
    fp32_gflops: float
    bf16_gflops: float
    seconds: float

    @property
    def bf16_speedup(self) -> float:
        """Rate of bf16 products over that of fp32; below 1, bf16 saves memory and costs time."""
        return self.bf16_gflops / self.fp32_gflops

    def problems(self) -> list[str]:
        """What the figures advise, one line each; empty when there is nothing to say."""
        found = []
        if self.bf16_speedup < 1:
            found.append(
                f"bf16 products reach {self.bf16_speedup:.2f} times the rate of fp32; train.dtype=fp32 should be faster"
            )
        if not self.read_buffer_exceeds_cache:
            found.append("too little free memory to read past the caches; the bandwidth shown is too high")
        return found


def describe_machine() -> Machine:
    """Read the description of the machine and of this process. Imports torch."""
    import torch

    total, available = _memory_bytes()
    return Machine(
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        cpu=_cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        instruction_sets=instruction_sets(),
        memory_gib=total / GIB,
        available_gib=available / GIB,
        gpus=_gpu_names(),
        openmp=loaded_openmp(),
    )


def measure_machine(seconds: float = 3.0) -> Measurement:
    """Measure memory bandwidth and matrix products within about `seconds`, with torch's current threads."""
    import torch

    start = time.perf_counter()
    read, buffer_bytes = _measure_read(seconds / 4)
    fp32 = _measure_product(torch.float32, seconds / 4)
    bf16 = _measure_product(torch.bfloat16, seconds / 4)
    return Measurement(
        threads=torch.get_num_threads(),
        read_gb_per_second=read / 1e9,
        read_buffer_gib=buffer_bytes / GIB,
        read_buffer_exceeds_cache=buffer_bytes >= 2 * _last_cache_bytes(),
        fp32_gflops=fp32 / 1e9,
        bf16_gflops=bf16 / 1e9,
        seconds=time.perf_counter() - start,
    )


def usable_threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS where the user set it, else every usable core."""
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wish) if wish.isdigit() and int(wish) > 0 else usable_cores()


def usable_cores() -> int:
    """Cores this process may use: the CPU affinity, and below it the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, int(quota)))


def instruction_sets() -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that CPU and operating system offer; empty where neither can be asked."""
    if sys.platform == "darwin":
        return _macos_instruction_sets()
    present = set(re.findall(r"\S+", _cpuinfo("flags") or _cpuinfo("Features")))
    return tuple(name for name in INSTRUCTION_SETS if name in present)


def loaded_openmp(maps: Path = Path("/proc/self/maps")) -> tuple[str, ...]:
    """Files of the OpenMP runtimes loaded in this process; only Linux can tell."""
    paths = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so[^/\s]*)", _read(maps))
    return tuple(sorted({os.path.realpath(path) for path in paths}))


def process_memory_gib() -> float:
    """Memory this process occupies now (resident set); elsewhere than on Linux its peak."""
    pages = _read(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / GIB if pages else peak_memory_gib()


def peak_memory_gib() -> float:
    """Most memory this process has occupied so far; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def keep_freed_memory() -> bool:
    """Let the allocator keep freed tensor memory for the next tensor; True if that took effect.

    By default glibc maps every large block afresh and unmaps it when freed, so that each temporary of a
    training step costs one page fault per 4 KiB: three elementwise operations on 64 MiB took 75 ms, and 20 ms
    with this set. The price: memory of blocks up to 1 GiB stays with the process until it ends. Elsewhere
    than on glibc nothing happens. Call it before the first large tensor.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES) and mallopt(M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Give freed memory that the allocator has kept back to the system; elsewhere than on glibc nothing happens.

    Temporaries of up to 32 MiB come from the heap, where what was allocated between them keeps their room from being
    returned when they are freed: 250 MB after packing a model of 4.8B parameters.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def cpu_quota(membership: Path, root: Path) -> float | None:
    """CPU seconds per second that the control groups grant, the least up to the root; None: no limit."""
    quotas = []
    for folder in _groups(membership, root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if not words:
            words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        quotas += [int(words[0]) / int(words[1])] if all(word.isdigit() for word in words) else []
    return min(quotas, default=None)


def memory_limit(membership: Path, root: Path) -> tuple[int, int] | None:
    """(limit, free below it) in bytes of the tightest control group; None: no limit.

    Free is what is not in use, file pages that the kernel would drop first counted as free.
    """
    limits = []
    for folder in _groups(membership, root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not limit.strip().isdigit() or not used.strip().isdigit():
            continue
        # v1 has two such lines, the group alone and then with its children; v2 has one, with them.
        pages = re.findall(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        free = int(limit) - int(used) + (int(pages[-1]) if pages else 0)
        limits.append((int(limit), max(0, free)))
    return min(limits, key=lambda pair: pair[1], default=None)


def _groups(membership: Path, root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, from its own up to the root, v2 then v1.

    Inside a container the listed path is often that of the host and absent; the parents still hold.
    """
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        own = top / path.lstrip("/")
        yield own
        yield from (parent for parent in own.parents if parent.is_relative_to(top))


def _memory_bytes() -> tuple[int, int]:
    """(total, available), control groups respected; available equals total where the system does not say."""
    lines = _read(Path("/proc/meminfo")).splitlines()
    fields = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    if fields:
        total = fields["MemTotal"] * 1024
        available = fields.get("MemAvailable", fields["MemFree"]) * 1024
    else:
        total = available = _total_memory_elsewhere()
    limit = memory_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return (min(total, limit[0]), min(available, limit[1])) if limit else (total, available)


def _total_memory_elsewhere() -> int:
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize").get("hw.memsize", "0"))
    return 0


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string").get("machdep.cpu.brand_string", platform.machine())
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.*)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else ""


def _macos_instruction_sets() -> tuple[str, ...]:
    flags = _sysctl("hw.optional")
    return tuple(name for name in INSTRUCTION_SETS if flags.get(MACOS_NAMES.get(name, "")) == "1")


def _sysctl(name: str) -> dict[str, str]:
    answer = subprocess.run(["sysctl", name], capture_output=True, text=True, check=False)
    pairs = (line.split(": ", 1) for line in answer.stdout.splitlines() if ": " in line)
    return {key: value.strip() for key, value in pairs}


def _gpu_names() -> tuple[str, ...]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return (*names, *(("Apple MPS",) if torch.backends.mps.is_available() else ()))


def _measure_read(budget: float) -> tuple[float, int]:
    """Best bytes per second of summing a buffer meant to exceed every cache, and the buffer's bytes."""
    import torch

    available = _memory_bytes()[1]
    size = min(max(GIB, 4 * _last_cache_bytes()), max(available // 4, 64 * 2**20), 4 * GIB)
    buffer = torch.ones(size // 4)  # written: pages never touched would cost faults, not reads
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
    """Least time of one call, among one call to warm up and as many as the budget holds, at least one."""
    work()
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _last_cache_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not say."""
    texts = [_read(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes = [int(text.strip()[:-1]) * 1024 for text in texts if text.strip().endswith("K")]
    return max(sizes, default=32 * 2**20)


def _version_pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _read(path: Path) -> str:
    """The text of a system file; empty where this system has no such file or keeps it to itself."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
