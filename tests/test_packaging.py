"""What sdists and wheels hold and are called, and that an installed wheel serves without the repository."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import moestro

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parent.parent
UNTRACKED = (".git", ".*venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs")
X86 = {"_PYTHON_HOST_PLATFORM": "linux-x86_64"}
RISCV = {"_PYTHON_HOST_PLATFORM": "linux-riscv64"}
NO_COMPILER = {"CC": "false", "CXX": "false"}
LIBRARY = "moestro/ops/libmoestro.so"


def build(kind: str, source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build an sdist or a wheel from `source` as pip does, on a machine whose name `environment` gives."""
    machine = environment.get("_PYTHON_HOST_PLATFORM", "linux-x86_64").partition("-")[2]
    code = (
        f"import platform; platform.machine = lambda: {machine!r}\n"
        f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MOESTRO_REQUIRE_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=clean | environment, capture_output=True, text=True, timeout=1500
    )


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist that a RISC-V machine makes of a used clone, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    clone = shutil.copytree(ROOT, folder / "clone", ignore=shutil.ignore_patterns(*UNTRACKED))
    (clone / LIBRARY).write_bytes(b"built long ago")
    (clone / "csrc/abi/generated.h").write_text("// written long ago")
    made = build("sdist", clone, folder / "out", **RISCV)
    assert made.returncode == 0, made.stderr
    archive = only(folder / "out")
    assert archive.name == f"moestro-{moestro.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    return only(folder / "unpacked")


def files(folder: Path, *parts: str) -> set[str]:
    """Paths below folders or of files that git would track."""
    found = [path for part in parts for path in [folder / part, *(folder / part).rglob("*")] if path.is_file()]
    untracked = ("__pycache__", "generated.h", ".so", ".pyc")
    return {str(path.relative_to(folder)) for path in found if not str(path).endswith(untracked)}


def test_an_sdist_holds_what_a_clone_does(sources: Path) -> None:
    parts = ("moestro", "csrc", "tests", "bench", "docs", ".ci", "Makefile", "setup.py", "constraints.txt")
    others = ("pyproject.toml", "README.md", "README.ko.md", "LICENSE", "NOTICE", ".clang-format")
    assert files(sources, *parts, *others) == files(ROOT, *parts, *others)
    assert not (sources / LIBRARY).exists() and not (sources / "csrc/abi/generated.h").exists()


@pytest.mark.parametrize(
    ("machine", "tag"), [(RISCV, "linux_riscv64"), (X86 | NO_COMPILER, "any")], ids=["another CPU", "no compiler"]
)
def test_a_wheel_without_kernels_is_not_called_like_one_with(
    sources: Path, tmp_path: Path, machine: dict[str, str], tag: str
) -> None:
    source = shutil.copytree(sources, tmp_path / "source")
    (source / LIBRARY).write_bytes(b"built long ago")
    refused = build("wheel", source, tmp_path / "refused", MOESTRO_REQUIRE_KERNELS="1", **machine)
    assert refused.returncode and "the native kernels need" in refused.stderr
    assert not [*tmp_path.glob("refused/*.whl")]
    made = build("wheel", source, tmp_path / "out", **machine)
    assert made.returncode == 0, made.stderr
    wheel = only(tmp_path / "out")
    assert wheel.name == f"moestro-{moestro.__version__}-py3-none-{tag}.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "moestro/ops/abi.py" in names and "moestro/presets/demo.toml" in names and LIBRARY not in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "bench/"))]


def test_a_failed_build_in_place_leaves_no_older_kernels(sources: Path, tmp_path: Path) -> None:
    source = shutil.copytree(sources, tmp_path / "source")
    (source / LIBRARY).write_bytes(b"built long ago")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    for required in ("1", ""):
        environment = os.environ | NO_COMPILER | {"MOESTRO_REQUIRE_KERNELS": required}
        said = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=60)
        assert bool(said.returncode) == bool(required) == (source / LIBRARY).exists(), said.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_a_wheel_serves_without_the_repository(sources: Path, tmp_path: Path) -> None:
    made = build("wheel", sources, tmp_path / "out", MOESTRO_REQUIRE_KERNELS="1")
    assert made.returncode == 0, made.stderr[-3000:]
    wheel = only(tmp_path / "out")
    assert wheel.name == f"moestro-{moestro.__version__}-py3-none-linux_x86_64.whl"

    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    dependencies = sysconfig.get_path("purelib")  # torch and the like, from the environment that runs this
    packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (packages / "dependencies.pth").write_text(dependencies + "\n")

    def run(*command: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "MOESTRO_"))}
        said = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=600)
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout.strip()

    python, command = str(home / "bin" / "python"), str(home / "bin" / "moestro")
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", str(wheel))
    which = "import moestro; from moestro.ops import library; print(moestro.__file__, library.current_isa())"
    where, isa = run(python, "-c", which).split(" ")
    assert Path(where).is_relative_to(home) and isa
    assert run(command, "--version") == f"moestro {moestro.__version__}"
    run(command, "init", "--preset", "demo", "--out", "model", "model.num_layers=2", "model.mtp_depth=0")
    assert run(command, "generate", "model", "--prompt", "Once", "--max-tokens", "1").startswith("Once")
