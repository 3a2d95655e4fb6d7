"""Who may write a run, what resuming it says, how it is stopped, and what a start that fails leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.config import Config
from moestro.data.batches import evaluation_batches
from moestro.data.shards import open_shards
from moestro.errors import ConfigError, DataError, MoestroError
from moestro.training import loop, prepare
from moestro.training.loop import train
from moestro.training.metrics import describe_gaps, read_evals, read_final_evals, read_metrics
from moestro.training.optim import lr_factor
from moestro.training.ownership import own_directory
from moestro.training.signals import Interrupted, stop_on_signal

Make = Callable[..., Config]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def never(path: Path) -> bool:
    return False


def start(config: Config, tmp_path: Path, run: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """`moestro train` as a process of its own."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "moestro", "train", "--config", str(file), "--out", str(run), *arguments]
    return subprocess.Popen(command, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options))


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@contextmanager
def held(directory: Path) -> Iterator[int]:
    """Another process holds the directory; gives its id."""
    code = (
        "import sys; from pathlib import Path; from moestro.training.ownership import own_directory\n"
        "with own_directory(Path(sys.argv[1]), lambda _: True): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(directory)], **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_second_writer_is_told_who_the_first_is_and_a_dead_one_keeps_nothing(
    make_config: Make, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with held(run) as pid:
        for resume in (True, False):
            with pytest.raises(MoestroError, match=rf"is being written by process {pid} since 20\d\d-"):
                train(make_config(), run, resume=resume, quiet=True)
    del before[run / "writer.lock"]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert train(make_config("train.steps=13"), run, resume=True, quiet=True).step == 13


def test_two_writers_started_on_one_new_folder_leave_one_run_without_a_step_twice(
    make_config: Make, tmp_path: Path
) -> None:
    run = tmp_path / "new" / "run"
    first = start(make_config("train.steps=100000", "train.minutes=0"), tmp_path, run)
    wait_for(run / "metrics.jsonl", first)
    second = start(make_config("train.steps=100000"), tmp_path, run, "--resume")
    _, told = second.communicate(timeout=120)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (128 + signal.SIGTERM, 2)
    assert told.decode().count("\n") == 1 and f"written by process {first.pid} since" in told.decode()
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1))


def test_owners_in_one_process_exclude_each_other_and_follow_each_other(tmp_path: Path) -> None:
    def own() -> None:
        with own_directory(tmp_path / "run", never):
            pass

    with own_directory(tmp_path / "run", never), pytest.raises(MoestroError, match=f"process {os.getpid()}"):
        own()
    own()


def test_a_failed_start_takes_back_what_it_made_and_nothing_else(tmp_path: Path) -> None:
    def fail(run: Path, is_begun: Callable[[Path], bool]) -> None:
        with own_directory(run, is_begun):
            (run / "data" / "deep").mkdir(parents=True)
            raise ZeroDivisionError

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "letter").write_text("dear")
    for run in (tmp_path / "old", tmp_path / "a" / "b" / "run"):
        with pytest.raises(ZeroDivisionError):
            fail(run, never)
    assert {path.name for path in tmp_path.rglob("*")} == {"old", "letter"}
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "c", lambda run: (run / "data").exists())
    assert (tmp_path / "c" / "data" / "deep").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["train.seq_len=129"], ConfigError),
        (["data.source=/nowhere/at/all"], DataError),
        (["data.tokenizer=builtin"], ConfigError),
        (["model.dense_dim=1000000000000"], MoestroError),
    ],
)
def test_starts_that_fail_leave_no_folder(
    make_config: Make, tmp_path: Path, overrides: list[str], error: type[MoestroError]
) -> None:
    with pytest.raises(error) as caught:
        train(make_config(*overrides), tmp_path / "runs" / "model", quiet=True)
    assert "intact" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_leaves_no_folder(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)

    for owner, name in ((prepare, "choose_tokenizer"), (loop, "begin_info")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(Interrupted) as caught:
                train(make_config(), tmp_path / "runs" / "model", quiet=True)
        assert caught.value.number == number and list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_at_once() -> None:
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


def test_a_hangup_that_the_caller_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_that_is_stopped_saves_and_answers_as_the_shell_expects(
    make_config: Make, tmp_path: Path, number: signal.Signals
) -> None:
    """Its readers are gone by then, as after a terminal has closed."""
    run = tmp_path / "run"
    process = start(
        make_config("train.steps=100000", "train.eval_every=1000", "train.checkpoint_every=9999"), tmp_path, run
    )
    wait_for(run / "metrics.jsonl", process)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(number)
    assert process.wait(120) == 128 + number
    (saved,) = (run / "checkpoints").iterdir()
    told = json.loads((run / "run.json").read_text())
    assert told["finished"] is False and told["starts"][0]["ended"] == number.name
    assert saved.name == f"step-{told['starts'][0]['to_step']:08d}"


def test_a_run_finishes_without_anyone_to_read_it(make_config: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open("/dev/full", "wb") as full:
        process = start(make_config("train.steps=2"), tmp_path, run, stdout=full, stderr=full)
        assert process.wait(120) == 0
    assert json.loads((run / "run.json").read_text())["finished"] is True


# ---- resuming ----


def test_resuming_what_does_not_exist_says_so_and_makes_nothing(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run in .*missing"):
        train(make_config(), tmp_path / "missing", resume=True, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    make_config: Make, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    outcome = train(make_config(), run, resume=True)
    assert (outcome.step, outcome.steps_now, outcome.stopped_by) == (12, 0, None)
    assert "is finished: 12 of 12 steps are done" in capsys.readouterr().err
    for name in ("run.json", "metrics.jsonl", "evals.jsonl"):
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes()


def test_a_finished_run_is_trained_further_with_a_new_warm_up(
    make_config: Make, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = make_config("train.steps=40", "train.warmup_steps=4")
    outcome = train(config, run, resume=True, quiet=True)
    assert (outcome.step, outcome.steps_now) == (40, 28)
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 41))
    rates = [record["lr"] / config.train.lr for record in records[12:]]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([lr_factor(step, 40, config.train) for step in range(16, 40)])
    assert [record["step"] for record in read_final_evals(run)] == [12, 40]


def test_a_run_given_more_steps_before_its_decay_goes_on_at_its_rate(make_config: Make, tmp_path: Path) -> None:
    run, steps = (
        tmp_path / "run",
        ("train.checkpoint_every=4", "train.keep_checkpoints=3", "train.decay_fraction=0.5", "train.warmup_steps=2"),
    )
    train(make_config("train.steps=12", *steps), run, quiet=True)
    for step in (8, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    train(make_config("train.steps=30", *steps), run, resume=True, quiet=True)
    config = make_config("train.steps=30", *steps).train
    assert [r["lr"] for r in read_metrics(run)][4:] == [
        config.lr * lr_factor(step, 30, config) for step in range(4, 30)
    ]


def test_warming_up_anew_never_exceeds_the_schedule(make_config: Make) -> None:
    config = make_config("train.steps=40", "train.warmup_steps=8", "train.decay_fraction=0.5").train
    plain = [lr_factor(step, 40, config) for step in range(40)]
    anew = [lr_factor(step, 40, config, warm_from=30) for step in range(30, 40)]
    assert all(new <= old for new, old in zip(anew, plain[30:], strict=True)) and anew[-1] == plain[-1]


def test_changed_settings_are_named_with_their_values(make_config: Make, tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"another model\.top_k \(2, not 3\)"):
        train(make_config("model.top_k=3"), tiny_run, resume=True, quiet=True)


def test_changed_data_is_refused_in_the_run_and_told_of_at_its_source(
    make_config: Make, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "text.jsonl", tmp_path / "run"
    shutil.copy(text_file, source)
    settings = (f"data.source={json.dumps(str(source))}", "train.steps=4", "train.checkpoint_every=2")
    train(make_config(*settings, "train.steps=2"), run, quiet=True)
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    train(make_config(*settings), run, resume=True)
    assert "have changed since the run began" in capsys.readouterr().err
    index = run / "data" / "shards" / "index.json"
    index.write_text(index.read_text().replace('"source": "', '"source": "0'))
    with pytest.raises(DataError, match="is not what the run was trained on"):
        train(make_config(*settings, "train.steps=6"), run, resume=True, quiet=True)


def test_every_start_of_a_run_is_kept(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for number, steps in enumerate((2, 4, 4), start=1):
        monkeypatch.setattr(sys, "argv", ["moestro", "train", f"no {number}"])
        train(make_config(f"train.steps={steps}"), run, resume=number > 1, quiet=True)
    told, records = json.loads((run / "run.json").read_text()), read_metrics(run)
    assert told["command"] == told["starts"][0]["command"] == "moestro train 'no 1'" and told["finished"] is True
    assert [(s["from_step"], s["to_step"], s["ended"]) for s in told["starts"]] == [
        (0, 2, "finished"),
        (2, 4, "finished"),
    ]
    assert [s["loss"] for s in told["starts"]] == [records[1]["loss_main"], records[3]["loss_main"]]
    assert told["starts"][1]["versions"].keys() == {"moestro", "torch", "python"}


def test_a_shortened_or_deleted_log_is_told_of(
    make_config: Make, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (tiny_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    cases = {
        "lacks 12 of 12 steps, the first of them 1": [],
        "lacks 2 of 12 steps, the first of them 11": whole[:10],
        "lacks 1 of 12 steps, the first of them 4": whole[:3] + whole[4:],
        "repeats 1 of 12 steps, the first of them 5": whole[:5] + whole[4:],
    }
    for number, (words, kept) in enumerate(cases.items()):
        run = tmp_path / str(number)
        shutil.copytree(tiny_run, run)
        (run / "metrics.jsonl").write_text("".join(kept))
        train(make_config("train.steps=13"), run, resume=True)
        assert f"metrics.jsonl {words}" in capsys.readouterr().err
    assert describe_gaps(read_metrics(tiny_run), 12) is None


# ---- evaluations ----


def test_every_point_of_a_curve_is_on_the_same_text_and_the_final_one_on_all(make_config: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config("train.eval_tokens=40", "data.valid_fraction=0.3")
    train(config, run, quiet=True)
    shards = open_shards(run / "data" / "shards")

    def count(limit: int | None) -> int:
        options = {"batch_size": 4, "seq_len": config.train.seq_len, "max_tokens": limit}
        batches = (b for d in shards.domains for b in evaluation_batches(shards, d, **options))
        return sum(int(np.asarray(batch.targets(0) >= 0).sum()) for batch in batches)

    assert count(40) < count(None)
    assert [(r["step"], r["evaluated_tokens"]) for r in read_evals(run)] == [(6, count(40)), (12, count(40))]
    assert [(r["step"], r["evaluated_tokens"]) for r in read_final_evals(run)] == [(12, count(None))]
