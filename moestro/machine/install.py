"""How to install what is missing into this very environment: every error that asks for a package says it with this.

No index has a package moestro, so that what works depends on how it came here: a clone in place, a file such as a
wheel, or neither, where the packages of an extra are named one by one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

ROOT = Path(__file__).parent.parent.parent  # of a clone; of an installed copy it is site-packages


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package here, to be typed into a shell."""
    source = _source()
    if source is not None and source.is_dir():
        return f"{pip()} install {_constraints(source)}-e {shlex.quote(f'{source}[{extra}]')}"
    if source is not None:
        return f"{pip()} install {shlex.quote(f'moestro[{extra}] @ {source.as_uri()}')}"
    return f"{pip()} install {' '.join(map(shlex.quote, _requirements(extra)))}"


def how_to_build() -> str:
    """The command that builds the kernels of this package anew. pip would reuse the wheel it has cached of a copy."""
    source = ROOT if (ROOT / "setup.py").is_file() else _source()
    if source is not None and source.is_dir():
        return f"{pip()} install {_constraints(source)}-e {shlex.quote(str(source))}"
    where = "FILE" if source is None else shlex.quote(str(source))
    return f"{pip()} install --force-reinstall --no-deps --no-cache-dir {where}"


def pip() -> str:
    """pip of this interpreter, as a shell here takes it."""
    python = sys.executable or "python"
    relative = os.path.relpath(python)
    return f"{shlex.quote(python if relative.startswith(os.pardir) else relative)} -m pip"


def _source() -> Path | None:
    """The clone that is installed in place, or the file that was installed, if it is still there (PEP 610)."""
    try:
        text = metadata.distribution("moestro").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(text or "{}")
    address = urlparse(origin.get("url", ""))
    path = Path(url2pathname(address.path))
    if address.scheme != "file" or not path.exists():
        return None
    return path if path.is_file() or origin.get("dir_info", {}).get("editable") else None


def _constraints(root: Path) -> str:
    """The option that keeps to the versions a clone was tested with."""
    path = root / "constraints.txt"
    return f"-c {shlex.quote(str(path))} " if path.is_file() else ""


def _requirements(extra: str) -> list[str]:
    """The packages of an extra, from the metadata of the installed package or from the clone."""
    if (ROOT / "pyproject.toml").is_file():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        return list(project["optional-dependencies"][extra])
    entries = metadata.requires("moestro") or []
    return [entry.partition(";")[0].strip() for entry in entries if re.search(rf"extra == ['\"]{extra}['\"]", entry)]
