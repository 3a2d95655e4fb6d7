"""What `pip install moestro` without extras can do, and what the rest says: one line with the extra to install."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moestro.config import Config
from moestro.data.corpus import iterate_documents
from moestro.engine.grammar import from_json_schema, from_lark, from_regex
from moestro.errors import ConfigError, DataError
from moestro.machine import how_to_install

EXTRAS = ("pyarrow", "datasets", "llguidance", "fastapi", "starlette", "uvicorn", "prometheus_client", "transformers")
PROGRAM = """
import io, json, sys
from moestro.cli import main
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
for command in json.loads(sys.argv[2]):
    sys.argv, sys.stdin = ["moestro", *command.split()], io.StringIO("hello\\n")
    try:
        main()
    except SystemExit as end:
        print(command.split()[0], end.code, flush=True)
"""


def test_a_model_is_trained_and_asked_without_any_extra(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """In a process of its own, in which the extras' modules cannot be imported."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(make_config("train.steps=1").model_dump(mode="json")))
    run = tmp_path / "run"
    commands = [
        f"train --config {config} --out {run} --quiet",
        f"eval {run} --max-tokens 40",
        f"generate {run} --prompt the --max-tokens 2",
        f"chat {run} --max-tokens 2",
        f"report {run}",
        f"pack {run} --out {tmp_path}/packed",
        f"serve {run}",
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps(EXTRAS), json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    codes = [line.split() for line in done.stdout.splitlines() if line.split()[-1:] in (["0"], ["2"])]
    names = [line.split()[0] for line in commands]
    assert codes == [[name, "2" if name == "serve" else "0"] for name in names], done.stderr
    assert done.stderr.splitlines()[-1] == f"moestro: serving needs llguidance: {how_to_install('server')}"


@pytest.mark.parametrize("name", ["texts.parquet", "texts.jsonl.zst"])
def test_files_that_need_pyarrow_say_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name} needs pyarrow: .* -m pip install .*"):
        list(iterate_documents(str(tmp_path / name)))


def test_grammars_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (lambda: from_regex("a"), lambda: from_lark('start: "a"'), lambda: from_json_schema(True)):
        with pytest.raises(ConfigError, match=r"needs llguidance: .* -m pip install .*"):
            make()
