"""The paths that this machine cannot run: their intrinsics emulated in AVX2 (SIMDe), held to the same tests; and the
compiled code of AArch64, under QEMU, held to what `csrc/abi/check.cpp` checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import runnable
from kernel_build import COMPILER, ROOT, build_settings, compile_all

COMMON = [
    "-Icsrc",
    "-std=c++17",
    "-O1",
    "-DMOESTRO_EMULATED=1",
    "-DMOESTRO_EMULATES_NEON=1",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
]
CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
EMULATED = ["-Wno-psabi", "-mavx2", "-mfma", "-mf16c"]

# Which tests a path has to pass: paths that differ from another in products of codes alone, only those.
CASES = {
    "avxvnni": "avxvnni and test_serving_weights",
    "avx512": "avx512 and not avx512vnni and not avx512bf16",
    "avx512vnni": "avx512vnni and test_serving_weights",
    "avx512bf16": "avx512bf16",
    "neon": "neon and not neondot",
    "neondot": "neondot and test_serving_weights",
}
MISSING = [isa for isa in CASES if isa not in runnable()]


def header(isa: str) -> str:
    """What emulates an instruction set, forced into its kernels."""
    return "tests/ops/emulated_neon.h" if isa.startswith("neon") else "tests/ops/emulated.h"


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in runnable(), reason="the native kernels are not built")
@pytest.mark.skipif(COMPILER is None or not Path("/usr/include/simde").is_dir(), reason="needs g++ and libsimde-dev")
def test_paths_that_this_machine_cannot_run(tmp_path: Path) -> None:
    emulated = {f"csrc/isa/kernels_{isa}.cpp": ["-include", header(isa), *EMULATED] for isa in MISSING}
    objects = compile_all(tmp_path, build_settings()["FLAGS"] | emulated, COMMON)
    built = tmp_path / "libmoestro.so"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fopenmp", *objects, "-o", str(built)], cwd=ROOT, check=True)
    cases = " or ".join(CASES[isa] for isa in MISSING)
    environment = os.environ | {"MOESTRO_LIBRARY": str(built)}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-k", cases, "tests/ops"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "passed" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not (CROSS and QEMU), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (qemu-user)")
def test_code_for_aarch64(tmp_path: Path) -> None:
    settings = build_settings()
    assert CROSS is not None and QEMU is not None
    sources = settings["PLAIN"] | settings["ARM"] | {"csrc/abi/check.cpp": []}
    objects = compile_all(tmp_path, sources, settings["COMMON"], CROSS)
    program = str(tmp_path / "check")
    subprocess.run([CROSS, "-static", "-fopenmp", *objects, "-o", program], cwd=ROOT, check=True, capture_output=True)
    for cpu, paths in (("max", 2), ("cortex-a53", 1)):  # the second lacks products of quadruples
        command = [QEMU, "-cpu", cpu, program]
        result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert (result.returncode, result.stdout) == (0, f"{paths} paths\n"), result.stdout + result.stderr
