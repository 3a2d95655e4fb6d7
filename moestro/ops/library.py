"""The compiled library of `csrc/`, loaded with ctypes, and the rules for which tensors it may take.

The library is optional and never the specification. If it was not built, or the CPU has neither AVX2 nor NEON, or a
tensor is not a plain fp32 or bf16 tensor in CPU memory, plain torch computes. With the kernels, results depend neither
on the number of threads nor on what else is in the batch. `MOESTRO_ISA` (one of `ISAS`) forces a lower path than the
best one, `MOESTRO_LIBRARY` names another build, `MOESTRO_OPS` forces plain torch: reference, the specifications, or
fused, the quick forms. `abi.py` lists the functions.
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
from moestro.ops import abi
from moestro.ops.abi import ISAS

TYPES = {torch.float32: abi.TYPES["float32"], torch.bfloat16: abi.TYPES["bfloat16"]}
CACHE_TYPES = TYPES | {torch.uint8: abi.TYPES["fp8_rows"]}
MESSAGES = {
    abi.ERRORS["bad_type"]: "unsupported type",
    abi.ERRORS["bad_size"]: "impossible size",
    abi.ERRORS["no_memory"]: "out of memory",
    abi.ERRORS["no_isa"]: "unsupported instruction set",
    abi.ERRORS["no_address"]: "an expert that is used has no address",
}
WISH = os.environ.get("MOESTRO_OPS", "")  # which form computes: reference, fused, or the best
PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # types with their own memory; a DTensor or a FakeTensor has none
LIBRARY = Path(os.environ.get("MOESTRO_LIBRARY") or Path(__file__).parent / "libmoestro.so")


if WISH not in ("", "reference", "fused"):
    raise ConfigError(f"MOESTRO_OPS={WISH} is neither reference nor fused")


@cache
def load_library() -> ctypes.CDLL | None:
    """The library on its best path, or the path `MOESTRO_ISA` names; None if it is missing or cannot run.

    It is loaded after torch, so that both use one OpenMP runtime. ConfigError for a path that this CPU cannot run, or
    for a library built from another version of `abi.py`.
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
    if _version_of(library) != abi.VERSION:
        raise ConfigError(
            f"the native kernels ({LIBRARY}) are of another version",
            hint=f"rebuild them: {machine.how_to_build()}",
        )
    abi.bind(library)
    if wish and library.moestro_set_isa(wish.encode()):
        raise ConfigError(f"MOESTRO_ISA={wish} is not one of {', '.join(ISAS)} that was built and this CPU can run")
    return library if library.moestro_isa() else None


def _version_of(library: ctypes.CDLL) -> int | None:
    """The version of `abi.py` that a library was built from; None if it does not say."""
    if not hasattr(library, "moestro_abi"):
        return None
    library.moestro_abi.restype = ctypes.c_uint32
    return int(library.moestro_abi())


def current_isa() -> str:
    """Name of the instruction set in use; empty if plain torch computes."""
    library = load_library()
    return library.moestro_isa().decode() if library else ""


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: plain tensors of one type, fp32 or bf16, in CPU memory."""
    kind = tensors[0].dtype
    plain = all(t.dtype == kind and t.device.type == "cpu" and type(t) in PLAIN_TYPES for t in tensors)
    return kind in TYPES and plain


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Whether kernels compute: they are built, this CPU runs them, and plain torch is not forced."""
    return not WISH and load_library() is not None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels compute serving operations on these tensors."""
    return is_available() and all(map(fits, tensors))


@cache
def multiplies_faster(dtype: torch.dtype) -> bool:
    """Whether the kernels, not torch, compute dense products of a type.

    Without bf16 instructions torch multiplies bf16 a hundred times slower than fp32, and of x86-64 CPUs its fp32 BLAS
    is at its best on Intel's only. Where both are at their best, they are about equal (docs/kernels.md).
    """
    described = machine.describe_machine()
    if dtype == torch.bfloat16:
        return not described.bf16_is_fast
    return "avx2" in described.instruction_sets and "Intel" not in described.cpu


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with numbers and the addresses of contiguous tensors (None: absent); raises on its error code."""
    library = load_library()
    assert library is not None
    raw = [_address(a) if isinstance(a, Tensor) else a for a in arguments]
    code = getattr(library, name)(*raw)
    if code:
        raise RuntimeError(f"{name}: {MESSAGES.get(code, code)}")


def _address(tensor: Tensor) -> int:
    if type(tensor) not in PLAIN_TYPES or tensor.device.type != "cpu":
        raise TypeError(f"kernels take plain tensors in CPU memory, not a {type(tensor).__name__} on {tensor.device}")
    return tensor.data_ptr()


def measure_peak(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations per second of products that touch no memory, the best within `seconds`: the machine's limit."""
    operations, best, rounds = torch.zeros(1, dtype=torch.int64), 0.0, 20000
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        call("moestro_multiply_in_registers", operations, rounds, TYPES[dtype], torch.get_num_threads())
        best = max(best, int(operations) / (time.perf_counter() - start))
    return best
