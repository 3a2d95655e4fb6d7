"""What `setup.py` builds with compilers of different ages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kernel_build import build_settings

pytest.importorskip("setuptools")

from setuptools import Distribution, Extension
from setuptools.errors import CompileError


class OldCompiler:
    """Notes what it is asked for, and refuses a flag."""

    def __init__(self, unknown: str) -> None:
        self.unknown = unknown
        self.compiled: dict[str, list[str]] = {}
        self.linked: list[str] = []

    def compile(self, sources: list[str], output_dir: str, extra_postargs: list[str]) -> list[str]:
        if self.unknown in extra_postargs:
            raise CompileError("unknown flag")
        self.compiled |= dict.fromkeys(sources, extra_postargs)
        return [f"{output_dir}/{Path(source).stem}.o" for source in sources]

    def link_shared_object(self, objects: list[str], *_: Any, **__: Any) -> None:
        self.linked = [Path(name).stem for name in objects]


@pytest.mark.parametrize("unknown", ["-mavxvnni", "-mavx512bf16", "-mnever"])
def test_a_compiler_builds_the_instruction_sets_that_it_knows(tmp_path: Path, unknown: str) -> None:
    settings = build_settings()
    command = settings["BuildNative"](Distribution())
    command.build_temp, command.build_lib = str(tmp_path), str(tmp_path / "lib")
    command.compiler = compiler = OldCompiler(unknown)
    command.build_extension(Extension("moestro.ops.libmoestro", []))
    known = [source for source, flags in settings["FLAGS"].items() if unknown not in flags]
    assert compiler.linked == [Path(source).stem for source in known]
    left_out = [flag for flag in compiler.compiled["csrc/abi/dispatch.cpp"] if "WITHOUT" in flag]
    expected = {"-mavxvnni": ["-DMOESTRO_WITHOUT_AVXVNNI"], "-mavx512bf16": ["-DMOESTRO_WITHOUT_AVX512BF16"]}
    assert left_out == expected.get(unknown, [])
