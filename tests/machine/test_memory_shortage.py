"""Memory that does not suffice is one line: said before anything is loaded, or when an allocation fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from system import write

from moestro import machine
from moestro.cli import main
from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.language_model import load, pack
from moestro.machine import memory
from moestro.model.transformer import Transformer
from moestro.training.checkpoint import write_model_directory
from moestro.training.loop import train

Make = Callable[..., Config]
# A command in a process whose address space may grow by so many bytes once everything is imported.
CHILD = """
import resource, sys
import moestro, moestro.cli.generate, moestro.engine.language_model, psutil, torch
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["moestro", *sys.argv[2:]]
moestro.cli.main()
"""


def test_a_control_groups_limit_is_the_machines_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, {"membership": "0::/a\n", "fs/a/memory.max": "5000\n", "fs/a/memory.current": "2000\n"})
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "ROOT", tmp_path / "fs")
    assert machine.usable_bytes() == 3000
    machine.require_memory(3000, "this takes")
    with pytest.raises(machine.MemoryShortageError, match=r"this takes 0.00 GB of memory, and 0.00 GB are free"):
        machine.require_memory(3001, "this takes")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("unable to mmap 800 bytes from file </x>: Cannot allocate memory (12)"),
    ],
)
def test_the_ways_in_which_memory_runs_out(error: Exception) -> None:
    assert machine.is_memory_error(error)
    with (
        pytest.raises(machine.MemoryShortageError, match="not enough memory to load this"),
        machine.explain_memory_errors("to load this"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(2, "No such file"), ValueError("memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert not machine.is_memory_error(error)
    with pytest.raises(type(error)), machine.explain_memory_errors("to load this"):
        raise error


def test_torch_says_what_we_look_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert machine.is_memory_error(caught.value)


def test_loading_is_refused_before_anything_is_read(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But not what is mapped: the system drops its pages when it needs them."""
    packed = tmp_path / "packed"
    pack(tiny_run, packed)
    monkeypatch.setattr(memory, "usable_bytes", lambda: 1000)
    monkeypatch.setattr(machine, "usable_bytes", lambda: 1000)
    with pytest.raises(machine.MemoryShortageError, match=r"this model's weights take 0\.00 GB"):
        _ = load(tiny_run).runtime
    with pytest.raises(machine.MemoryShortageError, match="packing this model takes"):
        pack(tiny_run, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert load(packed).runtime.mapped_bytes > 1000


def test_training_is_refused_before_anything_is_made(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "usable_bytes", lambda: 1000)
    with pytest.raises(machine.MemoryShortageError, match="training takes at least"):
        train(make_config(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize("room", [60 * 2**20, 160 * 2**20], ids=["mapping", "packing"])
def test_an_allocation_that_fails_is_one_line(
    make_config: Make, tokenizer: Tokenizer, tmp_path: Path, room: int
) -> None:
    """Weights of 110 MB: first the file cannot be mapped, then there is no room for the packed ones."""
    config = make_config("model.hidden_dim=1024", "model.expert_dim=512", "model.num_experts=16", "model.mtp_depth=0")
    with torch.device("meta"):
        model = Transformer(config.model)
    write_model_directory(tmp_path, model.to_empty(device="cpu"), tokenizer)
    options = ["--prompt", "the", "--max-tokens", "2", "--threads", "1"]
    command = [sys.executable, "-c", CHILD, str(room), "generate", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    assert "there is not enough memory" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_command_line_explains_an_error_that_nothing_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("moestro.machine.describe_machine", fail)
    monkeypatch.setattr(sys, "argv", ["moestro", "doctor"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("moestro: there is not enough memory")
