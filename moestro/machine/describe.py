"""What this process may use of the machine, and what would make it faster."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moestro.machine.install import pip
from moestro.machine.memory import GIB, memory_bytes
from moestro.machine.system_files import read_text
from moestro.machine.threads import loaded_openmp, usable_cores

# The instruction sets that decide which matrix kernels a CPU can run, in the order they are shown.
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

        This is necessary, not sufficient: some CPUs with avx512_bf16 multiply bf16 at half the rate of fp32. Only
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
            found.append(
                "this CPU has no bf16 instructions, so torch's own bf16 is slow; leave train.precision at auto"
            )
        if self.available_gib < LOW_MEMORY_GIB:
            found.append(
                f"only {self.available_gib:.1f} GiB of memory are free; close other programs, or lower train.batch_size"
            )
        if _version_pair(self.torch) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            found.append(f"torch {self.torch} is too old: {pip()} install 'torch>={oldest}'")
        return found


def describe_machine() -> Machine:
    """Read the description of the machine and of this process. Imports torch."""
    import torch

    total, available = memory_bytes()
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


def instruction_sets() -> tuple[str, ...]:
    """The `INSTRUCTION_SETS` that the CPU and operating system offer; empty if neither can be asked."""
    if sys.platform == "darwin":
        return _macos_instruction_sets()
    present = set(re.findall(r"\S+", _cpuinfo("flags") or _cpuinfo("Features")))
    return tuple(name for name in INSTRUCTION_SETS if name in present)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string").get("machdep.cpu.brand_string", platform.machine())
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.*)$", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
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


def _version_pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
