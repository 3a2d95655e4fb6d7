"""Memory: how much there is, how much this process occupies, and what its allocator does with freed memory.

`keep_freed_memory` changes the allocator of the whole process; only `moestro train` and the processes of a comparison
call it. `return_freed_memory` changes no settings.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from moestro.errors import MoestroError
from moestro.machine.system_files import MEMBERSHIP, ROOT, control_groups, read_text

GIB = 2**30

# From glibc's malloc.h. Blocks up to the threshold come from the heap; larger ones are mapped one by one.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
HEAP_BLOCK_BYTES = GIB


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of memory, within the limits of control groups."""
    memory, limit = psutil.virtual_memory(), memory_limit(MEMBERSHIP, ROOT)
    if limit is None:
        return memory.total, memory.available
    return min(memory.total, limit[0]), min(memory.available, limit[1])


def usable_bytes() -> int:
    """Bytes that a program could still be given: free memory and swap, within the limit of a control group."""
    memory, limit = psutil.virtual_memory(), memory_limit(MEMBERSHIP, ROOT)
    usable: int = memory.available + psutil.swap_memory().free
    return usable if limit is None else min(usable, limit[1])


def require_memory(needed: int, what: str) -> None:
    """Raise MemoryShortageError, "`what` … of memory", if more bytes are `needed` than `usable_bytes`."""
    usable = usable_bytes()
    if needed > usable:
        raise MemoryShortageError(
            f"{what} {needed / 1e9:,.2f} GB of memory, and {usable / 1e9:,.2f} GB are free",
            hint="moestro inspect shows what would fit",
        )


class MemoryShortageError(MoestroError):
    """There is not enough memory for what was asked."""


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch and safetensors have no class of their own for it."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, RuntimeError):
        return "allocate memory" in text or ("mmap" in text and f"({errno.ENOMEM})" in text)
    return type(error).__name__ == "SafetensorError" and f"os error {errno.ENOMEM}" in text


@contextmanager
def explain_memory_errors(what: str) -> Iterator[None]:
    """Turn the ways in which memory runs out inside into MemoryShortageError; `what` needed it."""
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        raise MemoryShortageError(
            f"there is not enough memory {what}", hint="moestro inspect shows what would fit"
        ) from error


def process_memory_gib() -> float:
    """Memory this process occupies now (resident set)."""
    return psutil.Process().memory_info().rss / GIB


def peak_memory_gib() -> float:
    """Most memory this process has occupied so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def keep_freed_memory() -> bool:
    """Let the allocator keep freed tensor memory for the next tensor; True if that took effect.

    By default glibc maps every large block afresh and unmaps it when freed, so that each temporary of a
    training step costs one page fault per 4 KiB: three elementwise operations on 64 MiB took 75 ms, and 20 ms
    with this set. The price: memory of blocks up to 1 GiB stays with the process until it ends. Without glibc
    this does nothing. Call it before the first large tensor; library functions never call it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES) and mallopt(M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Return freed memory that the allocator has kept to the system; without glibc this does nothing.

    Temporaries of up to 32 MiB come from the heap. Allocations between them keep their room from being returned when
    they are freed: 250 MB after packing a model of 4.8B parameters.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def memory_limit(membership: Path, root: Path) -> tuple[int, int] | None:
    """(limit, free below it) in bytes of the tightest control group; None: no limit.

    Memory not in use is free; file pages that the kernel would drop first count as free too.
    """
    limits = []
    for folder in control_groups(membership, root, "memory"):
        limit = read_text(folder / "memory.max") or read_text(folder / "memory.limit_in_bytes")
        used = read_text(folder / "memory.current") or read_text(folder / "memory.usage_in_bytes")
        if not limit.strip().isdigit() or not used.strip().isdigit():
            continue
        # v1 has two such lines, the group alone and then with its children; v2 has one, with children.
        pages = re.findall(r"^(?:total_)?inactive_file (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
        free = int(limit) - int(used) + (int(pages[-1]) if pages else 0)
        limits.append((int(limit), max(0, free)))
    return min(limits, key=lambda pair: pair[1], default=None)
