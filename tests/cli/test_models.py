"""Which model a command means: none, a path, a name of the Hub that is cached, that is not, that is to be fetched."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Call, last_json

from moestro.engine.language_model import load
from moestro.errors import CheckpointError

NAME = "someone/small-moe"


class Hub(SimpleNamespace):
    """Stands for huggingface_hub: what its cache holds, and what was fetched."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory=directory, cached=set(), fetched=[], error=None)

    def try_to_load_from_cache(self, name: str, file: str) -> str | None:
        return str(self.directory / file) if name in self.cached else None

    def snapshot_download(self, name: str, allow_patterns: list[str]) -> str:
        if self.error is not None:
            raise self.error
        self.fetched.append((name, allow_patterns))
        self.cached.add(name)
        return str(self.directory)


@pytest.fixture
def hub(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    snapshot = tmp_path / "models--someone--small-moe" / "snapshots" / "0123"
    shutil.copytree(tiny_run / "checkpoints" / "step-00000012", snapshot)
    fake: Any = Hub(snapshot)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_name_that_is_not_here_is_answered_with_what_fetches_it(call: Call, hub: Hub) -> None:
    for command in ("chat", "generate", "serve", "eval"):
        words = (command, NAME, "text") if command == "generate" else (command, NAME)
        code, out, err = call(*words)
        assert (code, out) == (2, "") and f"moestro {command} {NAME} --download" in err and err.count("\n") == 1
    code, _, err = call("inspect", NAME)
    assert code == 2 and f"hf download {NAME}" in err
    assert hub.fetched == []


def test_a_cached_name_is_a_model(call: Call, hub: Hub, tiny_run: Path) -> None:
    hub.cached.add(NAME)
    words = ("the cat", "--max-tokens", 4, "--json")
    assert last_json(call("generate", NAME, *words))["ids"] == last_json(call("generate", tiny_run, *words))["ids"]
    assert load(NAME).generate("the", max_tokens=2).ids
    assert last_json(call("inspect", NAME, "--json"))["model"]["hidden_dim"] == 32
    assert hub.fetched == []


def test_a_name_is_fetched_when_asked_for_and_only_what_is_data(call: Call, hub: Hub) -> None:
    assert last_json(call("generate", NAME, "the", "--max-tokens", 2, "--download", "--json"))["ids"]
    ((name, patterns),) = hub.fetched
    assert name == NAME and "*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in patterns)


@pytest.mark.parametrize(
    "error", [OSError("401 Client Error\nmore"), ValueError("offline mode is on"), FileNotFoundError()]
)
def test_a_failed_download_is_one_line(call: Call, hub: Hub, error: Exception) -> None:
    hub.error = error
    code, out, err = call("generate", NAME, "the", "--download")
    assert (code, out) == (2, "") and err.count("\n") == 1 and f"{NAME} could not be downloaded" in err


def test_paths_are_no_names(call: Call, hub: Hub) -> None:
    Path("runs").mkdir()
    for path in ("runs/none", "/a/b", "a/b/c", "none"):
        code, _, err = call("chat", path)
        assert code == 2 and f"{Path(path)} does not exist" in err
    with pytest.raises(CheckpointError, match="does not exist"):
        load("runs/none")


@pytest.mark.parametrize("command", ["chat", "generate", "serve", "eval"])
def test_without_a_model_those_of_runs_are_listed(call: Call, hub: Hub, tiny_run: Path, command: str) -> None:
    code, out, err = call(command)
    assert (code, out) == (2, "") and "train --preset demo" in err and err.count("\n") == 1
    shutil.copytree(tiny_run, "runs/first one")
    shutil.copytree(hub.directory, "runs/plain")
    Path("runs/empty").mkdir()
    (Path("runs/plain") / "evals.jsonl").write_text("not JSON")
    code, out, err = call(command)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("moestro: name a model")
    first = next(line for line in lines if "first one" in line)
    assert f"moestro {command} 'runs/first one'" in first and "bits per byte" in first and " MB" in first
    assert any(f"moestro {command} runs/plain " in line for line in lines)
