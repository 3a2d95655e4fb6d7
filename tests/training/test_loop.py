"""Whole runs: stopped, killed and resumed ones equal one that was left alone, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moestro.config import Config
from moestro.errors import CheckpointError, ConfigError, MoestroError
from moestro.training import checkpoint, loop, prepare
from moestro.training.checkpoint import latest_checkpoint
from moestro.training.loop import train
from moestro.training.metrics import read_evals, read_metrics, read_routing

Make = Callable[..., Config]
EXACT = ("step", "tokens", "loss", "loss_main", "loss_mtp", "loss_balance", "lr", "grad_norm", "max_vio",
         "dead_experts", "bits_per_byte", "mtp_agreement", "bias_min", "bias_max", "skipped")  # fmt: skip


def lines(run: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in EXACT} for record in read_metrics(run)]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(run)
    assert path is not None
    return load_file(path / "model.safetensors") | load_file(path / "train_state" / "optimizer.safetensors")


def assert_same_run(run: Path, expected: Path) -> None:
    assert lines(run) == lines(expected)
    ours, theirs = final_weights(run), final_weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_routing(run).tobytes() == read_routing(expected).tobytes()
    domains = [[{k: v for k, v in e.items() if k != "seconds"} for e in read_evals(r)] for r in (run, expected)]
    assert domains[0] == domains[1]


def stop_before_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Call `act` in the middle of step `number`, counted from 1."""
    calls = 0
    original = loop.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)


def test_a_run_learns_and_is_logged(tiny_run: Path) -> None:
    records = read_metrics(tiny_run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["loss_main"] < records[0]["loss_main"] - 0.5
    assert [evaluation["step"] for evaluation in read_evals(tiny_run)] == [6, 12]
    assert sorted(p.name for p in (tiny_run / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert json.loads((tiny_run / "run.json").read_text())["finished"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    make_config: Make, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_before_step(patch, 7, lambda: os.kill(os.getpid(), number))
        outcome = train(make_config(), run, quiet=True)
    assert (outcome.step, outcome.stopped_by) == (7, number)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert latest_checkpoint(run) == run / "checkpoints" / "step-00000007"
    assert json.loads((run / "run.json").read_text())["finished"] is False
    outcome = train(make_config(), run, resume=True, quiet=True)
    assert (outcome.step, outcome.stopped_by) == (12, None)
    assert_same_run(run, tiny_run)


def test_moments_in_bf16_are_resumed_to_the_bit(make_config: Make, tiny_run: Path, tmp_path: Path) -> None:
    settings = ("train.moments=bf16", "train.eval_every=100")
    train(make_config(*settings), tmp_path / "whole", quiet=True)
    train(make_config(*settings, "train.steps=12"), tmp_path / "cut", quiet=True)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000012")
    train(make_config(*settings), tmp_path / "cut", resume=True, quiet=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    losses = [read_metrics(run)[-1]["loss"] for run in (tmp_path / "whole", tiny_run)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_crash_between_checkpoints_goes_back_and_repeats(
    make_config: Make, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def crash() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        stop_before_step(patch, 9, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(make_config(), run, quiet=True)
    train(make_config(), run, resume=True, quiet=True)
    assert_same_run(run, tiny_run)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(make_config: Make, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    path = run / "checkpoints" / "step-00000012" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    outcome = train(make_config(), run, resume=True, quiet=True)
    assert outcome.step == 12
    assert_same_run(run, tiny_run)


KILLED = """
import os, signal, sys
from moestro.cli import main
from moestro.training import checkpoint, loop, metrics

owner, name, number = {
    "step": (loop, "train_step", 8),
    "log": (metrics.RunLog, "step", 8),
    "checkpoint": (checkpoint, "write_tensors", 2),
}[sys.argv.pop(1)]
original, calls = getattr(owner, name), 0

def dies(*args, **kwargs):
    global calls
    calls += 1
    result = original(*args, **kwargs)
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, dies)
main()
"""


@pytest.mark.parametrize(("moment", "steps"), [("step", 7), ("log", 8), ("checkpoint", 10)])
def test_a_killed_process_loses_nothing(
    make_config: Make, tiny_run: Path, tmp_path: Path, moment: str, steps: int
) -> None:
    """Killed after it computed its eighth step, logged it, or wrote half of its second checkpoint."""
    run, file = tmp_path / "run", tmp_path / "config.json"
    file.write_text(json.dumps(make_config().model_dump(mode="json")))
    arguments = [moment, "train", "--config", str(file), "--out", str(run), "--quiet"]
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(read_metrics(run)) == steps
    assert [path.name for path in (run / "checkpoints").glob("*.tmp")] == ["step-00000010.tmp"] * (steps == 10)
    outcome = train(make_config(), run, resume=True, quiet=True)
    assert outcome.step == 12
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert_same_run(run, tiny_run)


def test_a_full_disk_ends_the_run_with_one_line_and_a_resume_repairs_it(
    make_config: Make, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    original = checkpoint.write_tensors

    def fail_at_ten(directory: Path, *args: Any) -> None:
        if directory.name.startswith("step-00000010"):
            raise OSError(28, "No space left on device")
        original(directory, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", fail_at_ten)
        with pytest.raises(CheckpointError, match="No space left"):
            train(make_config(), run, quiet=True)
    assert latest_checkpoint(run) == run / "checkpoints" / "step-00000005"
    train(make_config(), run, resume=True, quiet=True)
    assert_same_run(run, tiny_run)


def test_non_finite_steps_are_skipped_and_too_many_end_the_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_step
    bad: set[int] = {3, 5}
    calls = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        return replace(result, loss=float("nan"), applied=False) if calls in bad else result

    monkeypatch.setattr(loop, "train_step", step)
    train(make_config("train.steps=6"), tmp_path / "few", quiet=True)
    assert read_metrics(tmp_path / "few")[-1]["skipped"] == 2
    calls, bad = 0, set(range(3, 100))
    with pytest.raises(MoestroError, match="not finite 5 steps in a row"):
        train(make_config("train.steps=50"), tmp_path / "many", quiet=True)


@pytest.mark.parametrize(
    ("override", "named"),
    [("model.top_k=3", "model"), ("train.seed=4", "train.seed"), ("train.seq_len=16", "train.seq_len"),
     ("data.valid_fraction=0.2", "data"), ("train.optimizer=muon", "train.optimizer"),
     ("train.moments=bf16", "train.moments")],
)  # fmt: skip
def test_resuming_with_another_configuration_is_refused(
    make_config: Make, tiny_run: Path, override: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"another {named}"):
        train(make_config(override), tiny_run, resume=True, quiet=True)


def test_places_in_use_are_refused(make_config: Make, tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run"):
        train(make_config(), tiny_run, quiet=True)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not a run"):
        train(make_config(), tmp_path, quiet=True)
    with pytest.raises(MoestroError, match="letter"):
        train(make_config(), tmp_path / "letter.txt" / "run", quiet=True)


def test_more_steps_prolong_a_finished_run_or_leave_it(make_config: Make, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    outcome = train(make_config(), tmp_path / "run", resume=True, quiet=True)
    assert outcome.step == outcome.total_steps == 12
    assert_same_run(tmp_path / "run", tiny_run)
    outcome = train(make_config("train.steps=14"), tmp_path / "run", resume=True, quiet=True)
    assert outcome.step == outcome.total_steps == 14
    outcome = train(make_config("train.steps=3"), tmp_path / "run", resume=True, quiet=True)
    assert outcome.step == outcome.total_steps == 14


def test_a_corpus_too_small_and_a_vocabulary_too_large_are_named(make_config: Make, tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("hello there\n")
    with pytest.raises(MoestroError) as caught:
        train(make_config(f"data.source={json.dumps(str(small))}"), tmp_path / "a", quiet=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"exceeds model\.max_seq_len=128"):
        train(make_config("train.seq_len=129"), tmp_path / "long", quiet=True)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=8192"):
        train(make_config("data.tokenizer=builtin"), tmp_path / "b", quiet=True)


@pytest.mark.parametrize("overrides", [["model.num_experts=0", "model.mtp_depth=0"], ["train.precision=bf16"]])
def test_dense_and_bf16_runs_work(make_config: Make, tmp_path: Path, overrides: list[str]) -> None:
    outcome = train(make_config("train.steps=3", *overrides), tmp_path / "run", quiet=True)
    assert outcome.step == 3 and outcome.evaluation is not None
    path = latest_checkpoint(tmp_path / "run")
    assert path is not None
    assert {t.dtype for t in load_file(path / "model.safetensors").values()} == {torch.float32}  # master weights


def test_a_signal_during_an_evaluation_saves_the_step(
    make_config: Make, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    original = loop.Loop.evaluate

    def interrupted(self: loop.Loop) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "evaluate", interrupted)
        outcome = train(make_config(), run, quiet=True)
    assert (outcome.step, outcome.stopped_by) == (6, signal.SIGINT)
    assert latest_checkpoint(run) == run / "checkpoints" / "step-00000006"
    train(make_config(), run, resume=True, quiet=True)
    assert_same_run(run, tiny_run)


def test_a_resume_names_the_checkpoint_that_it_passes_over(
    make_config: Make, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    os.truncate(run / "checkpoints" / "step-00000012" / "model.safetensors", 10)
    train(make_config(), run, resume=True)
    assert "step-00000012/model.safetensors differs from its manifest" in capsys.readouterr().err


def test_other_text_or_settings_after_a_failed_start_are_read_anew(
    make_config: Make, text_file: Path, tmp_path: Path
) -> None:
    run, text = tmp_path / "run", tmp_path / "more.jsonl"
    text.write_text('{"text": "hello there"}\n')
    source = f"data.source={json.dumps(str(text))}"
    with pytest.raises(MoestroError, match="less than one batch"):
        train(make_config(source), run, quiet=True)
    text.write_bytes(text_file.read_bytes())
    assert train(make_config(source, "train.steps=1"), run, quiet=True).step == 1
    with pytest.raises(ConfigError, match="8192"):
        train(make_config("data.tokenizer=builtin"), tmp_path / "other", quiet=True)
    assert train(make_config("train.steps=1"), tmp_path / "other", quiet=True).step == 1


def test_settings_survive_a_full_disk(
    make_config: Make, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = (run / "settings.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MoestroError, match="No space left"):
            train(make_config("train.lr=1e-3"), run, resume=True, quiet=True)
    assert (run / "settings.json").read_bytes() == before


def test_a_model_beyond_memory_is_one_line(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(MoestroError, match=r"^training takes at least [\d,.]+ TB of memory .* are free$"):
        train(make_config("model.dense_dim=1000000000000"), tmp_path / "run", quiet=True)


def test_a_model_of_short_sequences_writes_samples(make_config: Make, tmp_path: Path) -> None:
    config = make_config("model.max_seq_len=8", "train.seq_len=8", "train.steps=1")
    assert train(config, tmp_path / "run", quiet=True).samples


def test_a_tokenizer_sees_every_domain(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "TOKENIZER_SAMPLE", 20)
    for domain, text in (("a", "the cat sat"), ("b", "лунный кот")):
        (tmp_path / "texts" / domain).mkdir(parents=True)
        lines = (json.dumps({"text": f"{text} {number}"}) for number in range(40))
        (tmp_path / "texts" / domain / "all.jsonl").write_text("\n".join(lines))
    config = make_config(f"data.source={json.dumps(str(tmp_path / 'texts'))}")
    tokenizer = prepare.choose_tokenizer(config, lambda line: None)
    assert len(tokenizer.encode("лунный")) < len("лунный")
