"""The kernels under AddressSanitizer and UBSan: `csrc/abi/check.cpp` gives them buffers that end where sizes say."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
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


def build(sources: dict[str, list[str]], common: list[str], tmp_path: Path, check: Path) -> None:
    """Compile and link the program `check`."""
    objects = compile_all(tmp_path, sources, common)
    linked = run([str(COMPILER), *SANITIZE, "-fopenmp", *objects, "-o", str(tmp_path / "check")])
    assert linked.returncode == 0, linked.stderr
    shutil.copy2(tmp_path / "check", check.with_suffix(".tmp"))
    check.with_suffix(".tmp").replace(check)


def digest(sources: dict[str, list[str]], common: list[str]) -> str:
    """A name for what is compiled: every file of `csrc`, the flags and the compiler."""
    files = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cpp")]
    version = run([str(COMPILER), "--version"]).stdout
    text = repr((sources, common, version, [(path.name, path.read_text("utf-8")) for path in files]))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs an x86-64 C++ compiler")
def test_kernels_stay_inside_their_buffers(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """The program is kept in pytest's cache until something that goes into it changes."""
    pytest.importorskip("setuptools")
    settings = build_settings()
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }")
    empty = [str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if run([str(COMPILER), *SANITIZE, "-fopenmp", *empty]).returncode:
        pytest.skip("the compiler has no sanitizers")
    common = [*(flag for flag in settings["COMMON"] if flag != "-O3"), *SANITIZE]
    sources = settings["FLAGS"] | {"csrc/abi/check.cpp": []}
    unused = {f"csrc/isa/kernels_{isa}.cpp" for isa in library.ISAS if isa not in runnable()}
    for source in unused & sources.keys():  # linked, never called, and slow to compile with sanitizers
        sources[source] = [*sources[source], "-fno-sanitize=all"]
    cache = getattr(pytestconfig, "cache", None)
    check = (cache.mkdir("sanitized") if cache else tmp_path) / f"check-{digest(sources, common)}"
    if not check.exists():
        for old in check.parent.glob("check-*"):
            old.unlink()
        build(sources, common, tmp_path, check)
    quiet = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # libgomp keeps its threads: no leak of ours
    result = subprocess.run([str(check)], capture_output=True, text=True, timeout=1800, env=quiet)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert int(result.stdout.split()[0]) >= 1, "no instruction set was tried"
