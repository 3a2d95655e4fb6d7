"""The kernels under AddressSanitizer and UBSan: `csrc/abi/check.cpp` gives them buffers that end where sizes say."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from instruction_sets import runnable
from kernel_build import COMPILER, ROOT, build_settings, compile_all

from moestro.ops import library

# Unoptimised, since every access is checked then, and it compiles in a third of the time.
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs an x86-64 C++ compiler")
def test_kernels_stay_inside_their_buffers(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    settings = build_settings()
    assert COMPILER is not None
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }")
    if run([COMPILER, *SANITIZE, "-fopenmp", str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]).returncode:
        pytest.skip("the compiler has no sanitizers")
    common = [flag for flag in settings["COMMON"] if flag != "-O3"]
    sources = settings["FLAGS"] | {"csrc/abi/check.cpp": []}
    for isa in {*library.ISAS} - {*runnable()}:  # linked, never called, and slow to compile with sanitizers
        sources[f"csrc/isa/kernels_{isa}.cpp"] = [*sources[f"csrc/isa/kernels_{isa}.cpp"], "-fno-sanitize=all"]
    objects = compile_all(tmp_path, sources, [*common, *SANITIZE])
    linked = run([COMPILER, *SANITIZE, "-fopenmp", *objects, "-o", str(tmp_path / "check")])
    assert linked.returncode == 0, linked.stderr
    quiet = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # libgomp keeps its threads: no leak of ours
    result = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True, timeout=1800, env=quiet)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert int(result.stdout.split()[0]) >= 1, "no instruction set was tried"
