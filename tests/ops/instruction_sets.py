"""What tests of the kernels run on."""

from __future__ import annotations

from moestro.ops import library


def runnable() -> list[str]:
    """Names of the instruction sets that this machine can run; none where the kernels are not built."""
    kernels = library.load_library()
    if kernels is None:
        return []
    best = library.current_isa()
    found = [name for name in library.ISAS if kernels.moestro_set_isa(name.encode()) == 0]
    kernels.moestro_set_isa(best.encode())
    return found
