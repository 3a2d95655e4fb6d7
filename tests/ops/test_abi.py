"""One table for both sides: `moestro/ops/abi.py` against the header that people read, compilers and the library."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_build import COMPILER, ROOT, build_settings

from moestro.errors import ConfigError
from moestro.machine import how_to_build
from moestro.ops import abi, library

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def check_syntax(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the compiler says to C++ that includes csrc/, files in `folder` before those there."""
    (folder / "source.cpp").write_text(source)
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", f"-I{folder}", "-Icsrc", str(folder / "source.cpp")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_header_that_people_read_declares_what_the_table_does() -> None:
    text = re.sub(r"//.*", "", (ROOT / "csrc/abi/moestro.h").read_text("utf-8"))
    found = re.findall(r"^[\w ]+[ *]moestro_\w+\([^()]*\);", text, re.MULTILINE)
    declared = [abi.declare(name, parameters) for name, parameters in abi.FUNCTIONS.items()]
    assert sorted(" ".join(declaration.split()) for declaration in found) == sorted(declared)


def test_kernels_have_every_opcode_and_instruction_set_of_the_table() -> None:
    cases = re.findall(r"case MOESTRO_OP_(\w+): return \w+\(\);", (ROOT / "csrc/abi/run.cpp").read_text("utf-8"))
    assert cases == [opcode.name for opcode in abi.Opcode]
    named = re.findall(r'\{"(\w+)", &kernels_(\w+), runs_\w+\}', (ROOT / "csrc/isa/choices.h").read_text("utf-8"))
    assert {*named} == {(isa, isa) for isa in abi.ISAS}
    pytest.importorskip("setuptools")
    settings = build_settings()
    for sets in (settings["X86"], settings["ARM"]):  # the best one first, where the least stands first in setup.py
        units = [Path(source).stem.removeprefix("kernels_") for source in sets]
        assert [isa for isa, _ in named if isa in units][: len(units)] == units[::-1]
    assert [*settings["X86"], *settings["ARM"]] == [f"csrc/isa/kernels_{isa}.cpp" for isa in abi.ISAS]


@needs_compiler
def test_a_compiler_lays_out_a_step_as_ctypes_does(tmp_path: Path) -> None:
    build_settings()
    facts = [f"sizeof(MoestroStep) == {abi.ctypes.sizeof(abi.Step)}"]
    facts += [
        f"offsetof(MoestroStep, {name}) == {getattr(abi.Step, name).offset} && "
        f"sizeof(MoestroStep::{name}) == {getattr(abi.Step, name).size}"
        for name, _ in abi.Step._fields_
    ]
    source = "\n".join(['#include "abi/moestro.h"', "#include <cstddef>", *(f"static_assert({f});" for f in facts)])
    assert not (said := check_syntax(source, tmp_path)).returncode, said.stderr


@needs_compiler
def test_a_compiler_refuses_declarations_that_disagree(tmp_path: Path) -> None:
    source = '#include "abi/moestro.h"\n'
    (tmp_path / "abi").mkdir()
    (tmp_path / "abi" / "generated.h").write_text(abi.header(), "utf-8")
    assert not (said := check_syntax(source, tmp_path)).returncode, said.stderr
    changed = abi.header().replace(
        "int moestro_add(void *out, const void *a", "int moestro_add(void *out, const float *a"
    )
    (tmp_path / "abi" / "generated.h").write_text(changed, "utf-8")
    assert "moestro_add" in check_syntax(source, tmp_path).stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("const void *out", "const void *out"),  # nothing
        ("const void *a, *b; int64_t rows", "const float *a, *b; int64_t rows"),  # a type
        ("int64_t rows, width; int type, threads", "int64_t width, rows; int type, threads"),  # names of one type
        ("out x width type", "out x type width"),  # operands
        ("half_angles, ", ""),  # a field
        ('"int8": 2', '"int8": 4'),  # a number
        ("REVISION = 1", "REVISION = 2"),
    ],
)
def test_the_version_changes_with_the_table(old: str, new: str, tmp_path: Path) -> None:
    text = Path(abi.__file__).read_text("utf-8")
    assert old in text or old == new
    (tmp_path / "abi.py").write_text(text.replace(old, new), "utf-8")
    assert (runpy.run_path(str(tmp_path / "abi.py"))["VERSION"] == abi.VERSION) == (old == new)


def test_declarations_are_read() -> None:
    members = abi.read_members("void *const *pages; const float *cos, *sin; int64_t rows, width; int threads")
    assert members == [
        *(("void *const *", "pages"), ("const float *", "cos"), ("const float *", "sin")),
        *(("int64_t", "rows"), ("int64_t", "width"), ("int", "threads")),
    ]
    assert abi.declare("moestro_isa", "") == "const char *moestro_isa(void);"
    assert (
        abi.declare("moestro_new", "const char *name; int n, m") == "int moestro_new(const char *name, int n, int m);"
    )


@pytest.mark.skipif(not library.LIBRARY.exists(), reason="the native kernels are not built")
def test_the_library_is_of_this_version() -> None:
    kernels = library.load_library()
    assert kernels is not None and kernels.moestro_abi() == abi.VERSION
    assert library.current_isa() in abi.ISAS


@needs_compiler
@pytest.mark.parametrize("source", ["int other;", "unsigned moestro_abi(void) { return 1; }"])
def test_a_library_of_another_version_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.c").write_text(source)
    old = tmp_path / "old.so"
    command = [str(COMPILER), "-xc", "-shared", "-fPIC", str(tmp_path / "old.c"), "-o", str(old)]
    subprocess.run(command, check=True, timeout=60)
    monkeypatch.setattr(library, "LIBRARY", old)
    with pytest.raises(ConfigError, match=r"of another version$") as caught:
        library.load_library.__wrapped__()
    assert caught.value.hint == f"rebuild them: {how_to_build()}"
    if "moestro_abi" in source:
        environment = os.environ | {"MOESTRO_LIBRARY": str(old)}
        said = subprocess.run(
            [sys.executable, "-m", "moestro", "doctor"], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (said.returncode, said.stdout, said.stderr.count("\n")) == (2, "", 1)
        assert str(old) in said.stderr and "rebuild" in said.stderr
