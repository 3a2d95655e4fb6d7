"""The compiled library of `csrc/`, loaded with ctypes, and the rules of who may be handed to it.

Optional and never the specification: where the library was not built, or the CPU lacks AVX2, or a tensor is not a plain
one of fp32 or bf16 in CPU memory, plain torch computes the same. Results depend neither on the number of threads nor on
what else is in the batch. `MOESTRO_ISA` (one of `ISAS`) forces a lower path than the best one, `MOESTRO_LIBRARY` names
another build, `MOESTRO_OPS` (reference or fused) forces plain torch.
"""

from __future__ import annotations

import ctypes
import os
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moestro import machine
from moestro.errors import ConfigError

ISAS = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
ERRORS = {
    1: "unsupported type",
    2: "impossible size",
    3: "out of memory",
    4: "unsupported instruction set",
    5: "an expert that is used has no address",
}
PLAIN = os.environ.get("MOESTRO_OPS", "") in ("reference", "fused")  # what forces plain torch does so in serving, too
LIBRARY = Path(os.environ.get("MOESTRO_LIBRARY") or Path(__file__).parent / "libmoestro.so")

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "moestro_matmul": [_POINTER] * 3 + [_SIZE] * 6 + [_INT] * 5,
    "moestro_experts_forward": [_POINTER] * 8 + [_SIZE] * 4 + [_INT] * 2,
    "moestro_experts_backward": [_POINTER] * 12 + [_SIZE] * 4 + [_INT] * 2,
    "moestro_combine": [_POINTER] * 3 + [_SIZE] * 4 + [_INT] * 2,
    "moestro_multiply_in_registers": [_POINTER, _SIZE] + [_INT] * 2,
    "moestro_cross_entropy": [_POINTER] * 7 + [_SIZE] * 3 + [_INT] * 2,
    "moestro_pack": [_POINTER] * 2 + [_SIZE] * 2 + [_INT] * 3,
    "moestro_packed_linear": [_POINTER] * 3 + [_SIZE] * 4 + [_INT] * 3,
    "moestro_packed_experts": [_POINTER] * 6 + [_SIZE] * 5 + [_INT] * 3,
    "moestro_paged_attention": [_POINTER] * 6 + [_SIZE] * 10 + [_POINTER, _SIZE, _FLOAT] + [_INT] * 2,
    "moestro_rms_norm": [_POINTER] * 3 + [_SIZE] * 2 + [_FLOAT] + [_INT] * 3,
    "moestro_swiglu": [_POINTER] * 2 + [_SIZE] * 2 + [_INT] * 2,
    "moestro_flash_forward": [_POINTER] * 7 + [_SIZE] * 6 + [_FLOAT] + [_INT] * 2,
    "moestro_flash_backward": [_POINTER] * 11 + [_SIZE] * 6 + [_FLOAT] + [_INT] * 2,
    "moestro_rms_norm_backward": [_POINTER] * 5 + [_SIZE] * 2 + [_FLOAT] + [_INT] * 3,
    "moestro_swiglu_backward": [_POINTER] * 3 + [_SIZE] * 2 + [_INT] * 2,
    "moestro_join_heads": [_POINTER] * 5 + [_SIZE] * 8 + [_INT] * 2,
    "moestro_split_heads": [_POINTER] * 5 + [_SIZE] * 4 + [_INT] * 3,
    "moestro_set_isa": [ctypes.c_char_p],
    "moestro_rope": [_POINTER] * 4 + [_SIZE] * 7 + [_INT] * 3,
    "moestro_route": [_POINTER] * 4 + [_SIZE] * 5 + [_FLOAT] + [_INT] * 6,
    "moestro_add": [_POINTER] * 3 + [_SIZE] * 2 + [_INT] * 2,
    "moestro_run": [_POINTER, _SIZE, _POINTER],
}


@cache
def load_library() -> ctypes.CDLL | None:
    """The library on its best path, or the one `MOESTRO_ISA` names; None where it is missing or cannot run.

    Loaded after torch, so that both use the one OpenMP runtime. ConfigError for a name that this CPU cannot run.
    """
    wish = os.environ.get("MOESTRO_ISA", "")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        library = None
    if library is None:
        if wish:
            raise ConfigError(f"MOESTRO_ISA={wish}, but the native kernels are not built (moestro doctor)")
        return None
    library.moestro_isa.restype = ctypes.c_char_p
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    if wish and library.moestro_set_isa(wish.encode()):
        raise ConfigError(f"MOESTRO_ISA={wish} is not one of {', '.join(ISAS)} that was built and this CPU can run")
    return library if library.moestro_isa() else None


def current_isa() -> str:
    """Name of the instruction set in use; empty where plain torch computes."""
    library = load_library()
    return library.moestro_isa().decode() if library else ""


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: one type, fp32 or bf16, in CPU memory."""
    kind = tensors[0].dtype
    return kind in TYPES and all(t.dtype == kind and t.device.type == "cpu" for t in tensors)


def is_available() -> bool:
    """Whether kernels compute: they are built, this CPU runs them, and plain torch is not forced."""
    return not PLAIN and load_library() is not None


def serves(*tensors: Tensor) -> bool:
    """Whether operations of serving, on these, are left to the kernels."""
    return is_available() and all(map(fits, tensors))


@cache
def multiplies_faster(dtype: torch.dtype) -> bool:
    """Whether dense products of a type are left to the kernels rather than to torch.

    Without bf16 instructions torch multiplies bf16 a hundred times slower than fp32; its BLAS for fp32 is at its best
    on Intel's CPUs only. Where both are at their best, they are about equal (docs/kernels.md).
    """
    described = machine.describe_machine()
    return not described.bf16_is_fast if dtype == torch.bfloat16 else "Intel" not in described.cpu


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with the addresses of contiguous tensors (None: absent), and numbers; raises on its error code."""
    library = load_library()
    assert library is not None
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    code = getattr(library, name)(*raw)
    if code:
        raise RuntimeError(f"{name}: {ERRORS.get(code, code)}")


def measure_peak(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations per second of products that touch no memory, the best of `seconds`: the machine's limit."""
    operations, best, rounds = torch.zeros(1, dtype=torch.int64), 0.0, 20000
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        call("moestro_multiply_in_registers", operations, rounds, TYPES[dtype], torch.get_num_threads())
        best = max(best, int(operations) / (time.perf_counter() - start))
    return best
