"""Builds the native kernels of `csrc/` into `moestro/ops/libmoestro.so`, given a C++ compiler and an x86-64 or AArch64
CPU.

The library speaks C and knows neither Python nor torch, so one wheel serves every Python. Where it cannot be built the
package installs all the same and computes with plain torch; `moestro doctor` says which it is, and a wheel's name does:

    py3-none-linux_x86_64, py3-none-linux_aarch64     with kernels
    py3-none-any                                      built there, but without: they failed to build
    py3-none-linux_riscv64                            for another CPU, for which there are none

With MOESTRO_REQUIRE_KERNELS=1 a build without kernels is an error. All else is in `pyproject.toml`.
"""

from __future__ import annotations

import os
import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMMON = [
    "-Icsrc",
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-g0",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
PLAIN: dict[str, list[str]] = {"csrc/abi/dispatch.cpp": [], "csrc/abi/run.cpp": [], "csrc/abi/fp8.cpp": []}
X86 = {
    "csrc/isa/kernels_avx2.cpp": AVX2,
    "csrc/isa/kernels_avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "csrc/isa/kernels_avx512.cpp": AVX512,
    "csrc/isa/kernels_avx512vnni.cpp": [*AVX512, "-mavx512vnni"],
    "csrc/isa/kernels_avx512bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
ARM = {
    "csrc/isa/kernels_neon.cpp": [],
    "csrc/isa/kernels_neondot.cpp": ["-march=armv8.2-a+dotprod"],
}
SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine().lower(), {})  # least first
FLAGS = PLAIN | SETS
ALWAYS = {*PLAIN, *list(SETS)[:1]}
LIBRARY = "moestro.ops.libmoestro"
REQUIRED = os.environ.get("MOESTRO_REQUIRE_KERNELS", "") not in ("", "0")


def write_header() -> None:
    """`csrc/abi/generated.h` from the table that Python reads, too."""
    text, path = runpy.run_path("moestro/ops/abi.py")["header"](), Path("csrc/abi/generated.h")
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


class BuildNative(build_ext):
    """One translation unit per instruction set, each with its own flags, linked into one shared library.

    A compiler that does not know a newer instruction set builds the others. After a build that failed there is no
    library, not even an older one.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # an earlier build's
        if not SETS:
            raise CompileError(f"the native kernels need an x86-64 or AArch64 CPU, and this is {platform.machine()}")
        write_header()
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        missing = [source for source, flags in FLAGS.items() if not self._knows(flags)]
        if not ALWAYS.isdisjoint(missing):
            raise CompileError("the native kernels need a C++17 compiler that knows -mavx2 (g++ or clang++)")
        without = [f"-DMOESTRO_WITHOUT_{source.stem.partition('_')[2].upper()}" for source in map(Path, missing)]

        def build(source: str) -> list[str]:
            flags = [*COMMON, *FLAGS[source], *without]
            return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = chain.from_iterable(pool.map(build, [source for source in FLAGS if source not in missing]))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object([*objects], str(target), extra_postargs=["-fopenmp"], target_lang="c++")

    def copy_extensions_to_source(self) -> None:
        """Into the source tree, where an editable install finds it."""
        Path(self.get_ext_filename(LIBRARY)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def _knows(self, flags: list[str]) -> bool:
        """Whether the compiler takes flags for a program without code."""
        empty = Path(self.build_temp, "empty.cpp")
        empty.touch()
        try:
            self.compiler.compile([str(empty)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            print(f"left out: this compiler does not know {' '.join(flags)}")
            return False
        return True

    def get_ext_filename(self, ext_name: str) -> str:
        return f"{ext_name.replace('.', '/')}.so"  # no Python in its name: ctypes loads it


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 and this platform, or for any where the kernels that it could have are missing."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.get_finalized_command("build_ext")
        is_complete = not SETS or Path(build.get_ext_fullpath(LIBRARY)).exists()
        return ("py3", "none", super().get_tag()[2] if is_complete else "any")


headers = [str(path) for path in sorted(Path("csrc").rglob("*.h"))]
setup(
    ext_modules=[Extension(LIBRARY, list(FLAGS), depends=headers, optional=not REQUIRED)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
