"""Records the golden losses: `python tests/golden/record.py` trains all cells and rewrites `losses.json`.

To be run on purpose only, after a change that is meant to alter training, and with the reason in the commit's message.
It prints what differs from the record before, and refuses to write what a second run does not repeat.

Cells run in a child process whose arithmetic is pinned, so that every x86-64 CPU with AVX2 gives the same bits: the
kernels' AVX2 path for every product of the model, torch's AVX2 path, MKL's path for all vendors (products of the router
and of Muon; exp, log and erf), one thread. `cells.py` replaces the square root, the only one of these functions with an
approximation of the vendor's. Left to chance are other versions of torch, and logf and log2f of other C libraries.
Compilers were seen to agree (GCC 11 and 12, clang 16), but only at the optimisation that `setup.py` asks for.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import access
import torch

RECORD = Path(__file__).parent / "losses.json"
COMMAND = "python tests/golden/record.py"
SETTINGS_OF = ("MOESTRO_", "ATEN_", "MKL_", "ONEDNN_", "DNNL_", "OMP_", "GOMP_", "KMP_")  # not taken over from outside
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PINNED = {"MOESTRO_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
PLAIN = {"MOESTRO_OPS": "fused"}

Results = dict[str, dict[str, list[Any]]]


def run_cells(mode: str) -> Results:
    """What `cells.py` prints: `exact`, all cells with pinned arithmetic; `loose`, a few steps in plain torch."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(SETTINGS_OF)}
    library = {key: os.environ[key] for key in ("MOESTRO_LIBRARY",) if key in os.environ}
    environment = kept | library | ONE_THREAD | (PINNED if mode == "exact" else PLAIN)
    paths = [str(access.package_folder()), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(Path(__file__).parent / "cells.py"), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    results: Results = json.loads(done.stdout)
    return results


def toolchain() -> dict[str, str]:
    """What numbers may depend on beside the code of this project."""
    version = torch.__version__.partition("+")[0]
    return {"torch": version, "compiler": access.kernels_compiler(), "libc": " ".join(platform.libc_ver())}


def differences(before: Results, now: Results) -> list[str]:
    """A line for every cell whose numbers differ: at which step first, and by how much."""
    lines = [f"{name}: recorded, and no cell any more" for name in before if name not in now]
    lines += [f"{name}: not recorded yet" for name in now if name not in before]
    for name in (name for name in before if name in now):
        found = first_difference(before[name], now[name])
        if found:
            lines.append(f"{name}: {found}")
    return lines


def first_difference(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> str:
    """The first step, counted from 0, whose numbers differ; empty where none does."""
    if len(before["losses"]) != len(now["losses"]):
        return f"{len(before['losses'])} steps, now {len(now['losses'])}"
    steps = zip(*(cell[key] for key in ("losses", "grad_norms") for cell in (before, now)), strict=True)
    for step, (loss, loss_now, norm, norm_now) in enumerate(steps):
        if loss != loss_now:
            return f"step {step}, loss {describe(loss, loss_now)}"
        if norm != norm_now:
            return f"step {step}, gradient norm {describe(norm, norm_now)}"
    return "" if before["loads"] == now["loads"] else f"loads of all steps {before['loads']}, now {now['loads']}"


def describe(before: str, now: str) -> str:
    """Two numbers as `float.hex` writes them, and how far they are apart."""
    a, b = float.fromhex(before), float.fromhex(now)
    return f"{a:.9g}, now {b:.9g} (relative {abs(a - b) / abs(a):.1e}; {before}, now {now})"


def format_record(results: Results) -> str:
    """JSON with a line for each list of a cell."""
    cells = []
    for name in sorted(results):
        lists = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in results[name].items())
        cells.append(f"  {json.dumps(name)}: {{\n{lists}\n  }}")
    return f'{{\n "toolchain": {json.dumps(toolchain())},\n "cells": {{\n' + ",\n".join(cells) + "\n }\n}\n"


def main() -> None:
    """Train all cells twice and write the record."""
    if not access.kernels_run():
        raise SystemExit("the kernels are not built, or this CPU cannot run them: nothing was recorded")
    results = run_cells("exact")
    unstable = differences(results, run_cells("exact"))
    if unstable:
        raise SystemExit("\n".join(["two runs differ, nothing was recorded:", *unstable]))
    before: Results = json.loads(RECORD.read_text("utf-8"))["cells"] if RECORD.exists() else {}
    print("\n".join(differences(before, results)) or "nothing differs from the record before")
    RECORD.write_text(format_record(results), "utf-8")


if __name__ == "__main__":
    main()
