"""Building the kernels with other flags than setup.py's."""

from __future__ import annotations

import contextlib
import runpy
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


def build_settings() -> dict[str, Any]:
    """What setup.py compiles with; the header that it writes is there afterwards."""
    with mock.patch("setuptools.setup"), contextlib.chdir(ROOT):
        settings = runpy.run_path("setup.py")
        settings["write_header"]()
    return settings


def compile_all(
    folder: Path, sources: Mapping[str, Sequence[str]], common: Sequence[str], compiler: str | None = COMPILER
) -> list[str]:
    """Compile sources, each with flags of its own, side by side -> object files in `folder`."""
    assert compiler is not None
    objects, building = [], []
    for source, flags in sources.items():
        objects.append(str(folder / f"{Path(source).stem}.o"))
        command = [compiler, *common, *flags, "-c", source, "-o", objects[-1]]
        building.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    try:
        for process in building:
            _, errors = process.communicate(timeout=1800)
            assert process.returncode == 0, errors
    finally:
        for process in building:
            process.kill()
    return objects
