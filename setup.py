"""Builds the native kernels of `csrc/` into `moestro/ops/libmoestro.so`, given a C++ compiler and an x86-64 CPU.

The library speaks C and knows neither Python nor torch, so one wheel serves every Python. Without a compiler the
package installs all the same and computes with plain torch; `moestro doctor` says which it is. All else is in
`pyproject.toml`.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMMON = [
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
    "csrc/dispatch.cpp": [],
    "csrc/run.cpp": [],
    "csrc/kernels_avx2.cpp": AVX2,
    "csrc/kernels_avx512.cpp": AVX512,
    "csrc/kernels_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
LIBRARY = "moestro.ops.libmoestro"


class BuildNative(build_ext):
    """One translation unit per instruction set, each with its own flags, linked into one shared library."""

    def build_extension(self, ext: Extension) -> None:
        objects: list[str] = []
        for source, flags in FLAGS.items():
            objects += self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=[*COMMON, *flags])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-fopenmp"], target_lang="c++")

    def get_ext_filename(self, ext_name: str) -> str:
        return f"{ext_name.replace('.', '/')}.so"  # no Python in its name: ctypes loads it


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


x86 = platform.machine().lower() in ("x86_64", "amd64")
headers = [str(path) for path in sorted(Path("csrc").glob("*.h"))]
setup(
    ext_modules=[Extension(LIBRARY, list(FLAGS), depends=headers, optional=True)] if x86 else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel} if x86 else {},
)
