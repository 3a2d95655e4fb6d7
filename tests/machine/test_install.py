"""The command that installs what is missing, for each way in which this package can have come here."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from moestro.machine import how_to_build, how_to_install, install

ROOT = Path(__file__).parent.parent.parent


class Installed:
    """A distribution with these files."""

    def __init__(self, origin: dict[str, object] | None) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._origin is None else json.dumps(self._origin)


def came_from(monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None) -> None:
    monkeypatch.setattr(install.metadata, "distribution", lambda name: Installed(origin))


def test_a_clone_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    came_from(monkeypatch, {"url": clone.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(how_to_install("server"))[-3:] == ["install", "-e", f"{clone}[server]"]
    (clone / "constraints.txt").touch()
    words = shlex.split(how_to_install("data"))
    assert words[1:] == ["-m", "pip", "install", "-c", str(clone / "constraints.txt"), "-e", f"{clone}[data]"]
    assert Path(words[0]).resolve() == Path(sys.executable).resolve()
    assert shlex.split(how_to_build())[-2:] == ["-e", str(ROOT)]  # the kernels of the code that runs
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert shlex.split(how_to_build())[-2:] == ["-e", str(clone)]


def test_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "moestro-1.0-py3-none-any.whl"
    wheel.touch()
    came_from(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert shlex.split(how_to_install("server"))[-1] == f"moestro[server] @ {wheel.as_uri()}"
    assert shlex.split(how_to_build())[-3:] == ["--no-deps", "--no-cache-dir", str(wheel)]


@pytest.mark.parametrize("origin", [None, {"url": "file:///gone/moestro.whl"}, {"url": "https://example.org/m.whl"}])
def test_packages_one_by_one_where_the_source_is_not_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: dict[str, object] | None
) -> None:
    came_from(monkeypatch, origin)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    entries = ['fastapi>=0.135; extra == "server"', "torch>=2.6", "pyarrow>=17 ; extra == 'data'"]
    monkeypatch.setattr(install.metadata, "requires", lambda name: entries)
    assert shlex.split(how_to_install("server"))[2:] == ["pip", "install", "fastapi>=0.135"]
    assert shlex.split(how_to_install("data"))[2:] == ["pip", "install", "pyarrow>=17"]


def test_a_clone_that_is_not_installed_names_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise install.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install.metadata, "distribution", absent)
    packages = [re.split("[<>=]", word)[0] for word in shlex.split(how_to_install("server"))[4:]]
    assert packages == ["fastapi", "uvicorn", "prometheus-client", "llguidance"]


def test_nothing_names_a_package_that_no_index_has() -> None:
    """Neither messages nor documents: `moestro[extra]` alone means a package of an index."""
    files = [*(ROOT / "moestro").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")]
    wrong = re.compile(r"pip install (?:-\S+ )*(?:'moestro\[\w+\]'|\"moestro\[\w+\]\"|moestro\b(?![-/.\w]))")
    assert wrong.search("run pip install 'moestro[server]'")
    assert not wrong.search("pip install 'moestro[server] @ file:///a.whl'")
    assert [path.name for path in files if wrong.search(path.read_text("utf-8"))] == []
