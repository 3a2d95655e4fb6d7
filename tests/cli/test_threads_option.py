"""Every command that computes sets the number of threads; `--threads` says which. Training also sets the allocator."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.config import Config
from moestro.machine import Measurement

COMMANDS = {
    "train": "train --config {config} --out {tmp}/run --quiet train.steps=1",
    "eval": "eval {run} --max-tokens 40",
    "ablate": "ablate {run} --what top1 --max-tokens 40",
    "generate": "generate {run} --prompt the --max-tokens 2",
    "chat": "chat {run} --max-tokens 2",
    "serve": "serve {run} --port 0 --memory 64MiB",
    "pack": "pack {run} --out {tmp}/packed",
    "init": "init --preset demo --out {tmp}/model model.num_layers=2 model.vocab_size=512",
    "doctor": "doctor --seconds 0.5",
}


class Called(list[str]):
    """What was set for the process, in order."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """Spies in place of what changes the process; a server that ends at once, a chat that says one line."""
    calls = Called()
    monkeypatch.setattr("moestro.machine.use_threads", lambda threads=0: calls.append(f"threads {threads}"))
    monkeypatch.setattr("moestro.machine.keep_freed_memory", lambda: calls.append("malloc"))
    measured = Measurement(2, 20.0, 1.0, True, fp32_gflops=1.0, bf16_gflops=1.0, seconds=1.0)
    monkeypatch.setattr("moestro.machine.measure_machine", lambda seconds: measured)
    monkeypatch.setattr("moestro.server.run.run_service", lambda service, *_: service.close())
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    return calls


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config], tiny_run: Path, tmp_path: Path
) -> Callable[..., int]:
    """`run_command("pack …", "--threads", "1")` -> exit code; {run}, {tmp} and {config} are filled in."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(make_config("train.threads=5").model_dump(mode="json")))

    def run(command: str, *more: str) -> int:
        words = command.format(run=tiny_run, tmp=tmp_path, config=config).split()
        monkeypatch.setattr(sys, "argv", ["moestro", *words, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_computes_takes_threads(name: str, called: Called, run_command: Callable[..., int]) -> None:
    assert run_command(COMMANDS[name], "--threads", "2") == 0
    assert called == ["threads 2"] + (["malloc"] if name == "train" else [])


@pytest.mark.parametrize("name", ["generate", "train"])
def test_without_the_option_it_is_every_core_or_the_configuration(
    name: str, called: Called, run_command: Callable[..., int]
) -> None:
    assert run_command(COMMANDS[name]) == 0
    assert called[0] == {"generate": "threads 0", "train": "threads 5"}[name]


def test_a_comparison_hands_threads_to_its_runs(
    monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., int]
) -> None:
    threads: list[int] = []

    def keep(plan: object, **_: object) -> int:
        threads.append(plan.threads)  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr("moestro.cli.compare.run_and_show", keep)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    command = "compare --routers dense --budget 1ktok --out {tmp}/comparison --jobs 2"
    assert run_command(command) == run_command(command, "--threads", "3") == 0
    assert threads == [2, 3]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
@pytest.mark.parametrize("threads", ["-1", "2000"])
def test_a_number_that_cannot_be_is_one_line(
    name: str, threads: str, called: Called, run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(COMMANDS[name], "--threads", threads) == 2
    assert f"--threads must lie between 0 and 1024, not {threads}" in capsys.readouterr().err
    assert not called


def test_train_refuses_a_number_that_cannot_be(
    called: Called, run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(COMMANDS["train"], "--threads", "-1") == 2
    err = capsys.readouterr().err
    assert "train.threads" in err and err.count("\n") == 1
    assert not called
