"""Builds the native kernels of `csrc/` into `moestro/ops/libmoestro.so`, given a C++ compiler and an x86-64 CPU.

The library speaks C and knows neither Python nor torch, so one wheel serves every Python. Without a compiler the
package installs all the same and computes with plain torch; `moestro doctor` says which it is. All else is in
`pyproject.toml`.
"""

from __future__ import annotations

import os
import platform
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
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
FLAGS = {
    "csrc/abi/dispatch.cpp": [],
    "csrc/abi/run.cpp": [],
    "csrc/isa/kernels_avx2.cpp": AVX2,
    "csrc/isa/kernels_avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "csrc/isa/kernels_avx512.cpp": AVX512,
    "csrc/isa/kernels_avx512vnni.cpp": [*AVX512, "-mavx512vnni"],
    "csrc/isa/kernels_avx512bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
LIBRARY = "moestro.ops.libmoestro"


class BuildNative(build_ext):
    """One translation unit per instruction set, each with its own flags, linked into one shared library.

    A compiler that does not know a newer instruction set builds the others.
    """

    def build_extension(self, ext: Extension) -> None:
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        missing = [source for source, flags in FLAGS.items() if not self._knows(flags)]
        without = [f"-DMOESTRO_WITHOUT_{source.stem.partition('_')[2].upper()}" for source in map(Path, missing)]

        def build(source: str) -> list[str]:
            flags = [*COMMON, *FLAGS[source], *without]
            return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = chain.from_iterable(pool.map(build, [source for source in FLAGS if source not in missing]))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object([*objects], str(target), extra_postargs=["-fopenmp"], target_lang="c++")

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
    """A wheel for this platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


x86 = platform.machine().lower() in ("x86_64", "amd64")
headers = [str(path) for path in sorted(Path("csrc").rglob("*.h"))]
setup(
    ext_modules=[Extension(LIBRARY, list(FLAGS), depends=headers, optional=True)] if x86 else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel} if x86 else {},
)
