"""What tests of the kernels run on."""

from __future__ import annotations

from moestro.ops import native


def runnable() -> list[str]:
    """Names of the instruction sets that this machine can run; none where the kernels are not built."""
    library = native.load_library()
    if library is None:
        return []
    best = native.current_isa()
    found = [name for name in native.ISAS if library.moestro_set_isa(name.encode()) == 0]
    library.moestro_set_isa(best.encode())
    return found
