"""The paths that this machine cannot run, their intrinsics emulated in AVX2 (SIMDe), held to the same tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import runnable
from kernel_build import COMPILER, ROOT, build_settings, compile_all

from moestro.ops import library

COMMON = ["-Icsrc", "-std=c++17", "-O1", "-DMOESTRO_EMULATED=1", "-fPIC", "-fopenmp", "-ffp-contract=fast"]
EMULATED = ["-include", "tests/ops/emulated.h", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c"]

MISSING = [isa for isa in library.ISAS if isa not in runnable()]
# paths with VNNI alone differ from those without in products of codes only
CASES = "avx512 and not avx512vnni or (avxvnni or avx512vnni) and test_serving_weights"


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in runnable(), reason="the native kernels are not built")
@pytest.mark.skipif(not MISSING, reason="this machine runs every path itself")
@pytest.mark.skipif(COMPILER is None or not Path("/usr/include/simde").is_dir(), reason="needs g++ and libsimde-dev")
def test_paths_that_this_machine_cannot_run(tmp_path: Path) -> None:
    emulated = {f"csrc/isa/kernels_{isa}.cpp": EMULATED for isa in MISSING}
    objects = compile_all(tmp_path, build_settings()["FLAGS"] | emulated, COMMON)
    built = tmp_path / "libmoestro.so"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fopenmp", *objects, "-o", str(built)], cwd=ROOT, check=True)
    environment = os.environ | {"MOESTRO_LIBRARY": str(built)}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-k", CASES, "tests/ops"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
