"""The files of a run: written, cut, read back, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moestro.errors import ConfigError, MoestroError
from moestro.training import metrics
from moestro.training.metrics import RunLog

LAYERS = ["1", "2", "mtp.0"]
E = 4


def record(step: int, **more: Any) -> dict[str, Any]:
    return dict.fromkeys(metrics.STEP_KEYS, 0.5) | {"step": step, "tokens": step * 64} | more


def loads_of(step: int) -> np.ndarray:
    return np.arange(12).reshape(3, 4) + step


def write_steps(log: RunLog, steps: range) -> None:
    for step in steps:
        log.step(record(step), loads_of(step), loads_of(step) * -0.001)
        if step % 5 == 0:
            domains = {name: {"bits_per_byte": 1.0, "loss": 2.0, "tokens": 9, "bytes": 30} for name in ("ko", "en")}
            evaluation = {"step": step, "tokens": step, "seconds": 1, "loss": 2.0, "bits_per_byte": 1.0}
            log.evaluation(evaluation | {"domains": domains}, np.full((2, 3, E), step, np.uint64))
            log.sample(step, "ko", "가", "나다")
            log.fp8({"step": step, "tokens": step, "layers": {"0": {"q": {"weights": {"error": math.nan}}}}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log = RunLog.open(tmp_path / "run", LAYERS, E)
    write_steps(log, range(1, 13))
    log.sync()
    log.close()
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_everything_written_is_read_back(run: Path) -> None:
    assert [line["step"] for line in metrics.read_metrics(run)] == list(range(1, 13))
    assert list(metrics.read_metrics(run)[0]) == list(metrics.STEP_KEYS)
    assert [line["domains"]["ko"]["bytes"] for line in metrics.read_evals(run)] == [30, 30]
    assert metrics.read_samples(run)[-1] == {"step": 10, "domain": "ko", "prompt": "가", "text": "나다"}
    assert metrics.read_fp8(run)[1] == {"step": 10, "tokens": 10, "layers": {"0": {"q": {"weights": {"error": None}}}}}
    assert metrics.read_routing_layers(run) == LAYERS
    routing = metrics.read_routing(run)
    assert routing["step"].tolist() == list(range(1, 13))
    np.testing.assert_array_equal(routing["loads"][6], loads_of(7))
    np.testing.assert_array_equal(routing["biases"][6], (loads_of(7) * -0.001).astype(np.float32))
    names, domain_loads = metrics.read_domain_loads(run)
    assert names == ["ko", "en"]
    assert list(domain_loads) == [5, 10]
    assert domain_loads[10].tolist() == np.full((2, 3, E), 10).tolist()


def test_routing_file_has_the_documented_bytes(run: Path) -> None:
    raw = (run / "routing.bin").read_bytes()
    size = 8 + 3 * E * 4 * 2
    assert len(raw) == 12 * size
    third = raw[2 * size : 3 * size]
    assert int.from_bytes(third[:8], "little") == 3
    assert np.frombuffer(third[8 : 8 + 48], "<u4").tolist() == loads_of(3).ravel().tolist()
    assert json.loads((run / "routing.json").read_text()) == {
        "version": 1,
        "layers": LAYERS,
        "num_experts": E,
    }


def test_resume_equals_an_uninterrupted_run(run: Path) -> None:
    expected = contents(run)
    log = RunLog.open(run, LAYERS, E, resume_step=7)
    assert [line["step"] for line in metrics.read_metrics(run)] == list(range(1, 8))
    assert list(metrics.read_domain_loads(run)[1]) == [5]
    write_steps(log, range(8, 13))
    log.close()
    assert contents(run) == expected


@pytest.mark.parametrize("resume_step", [None, 0])
def test_a_fresh_run_empties_what_was_there(run: Path, resume_step: int | None) -> None:
    (run / "domain_loads/.step-00000015.npy.tmp").write_bytes(b"half")
    RunLog.open(run, ["9"], 8, resume_step).close()
    assert metrics.read_metrics(run) == metrics.read_evals(run) == metrics.read_samples(run) == []
    assert metrics.read_routing(run).shape == (0,)
    assert metrics.read_routing_layers(run) == ["9"]
    assert metrics.read_domain_loads(run) == ([], {})
    assert list((run / "domain_loads").iterdir()) == []


@pytest.mark.parametrize("cut", [1, 20, 70])
def test_a_truncated_tail_is_ignored_and_cut(run: Path, cut: int) -> None:
    expected = contents(run)
    for name in ("metrics.jsonl", "routing.bin"):
        (run / name).write_bytes((run / name).read_bytes()[:-cut])
    assert len(metrics.read_metrics(run)) == len(metrics.read_routing(run)) == 11
    log = RunLog.open(run, LAYERS, E, resume_step=11)
    write_steps(log, range(12, 13))
    log.close()
    assert contents(run) == expected


@pytest.mark.parametrize("damage", [b"{\n", b"\xff\xfe\n", b"[1]\n", b'{"step": "x"}\n', b"\n"])
def test_a_damaged_middle_line_is_named(run: Path, damage: bytes) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    for read in (metrics.read_metrics, lambda path: RunLog.open(path, LAYERS, E, resume_step=9)):
        with pytest.raises(MoestroError, match=r"metrics\.jsonl, line 3 is damaged"):
            read(run)


def test_damaged_arrays_and_indices_are_named(run: Path) -> None:
    (run / "domain_loads/step-00000005.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(MoestroError, match=r"step-00000005\.npy is damaged"):
        metrics.read_domain_loads(run)
    (run / "routing.json").write_text('{"version": 99}')
    with pytest.raises(MoestroError, match="not a routing log of version 1"):
        metrics.read_routing(run)
    (run / "routing.json").write_text("{")
    with pytest.raises(MoestroError, match=r"routing\.json is damaged"):
        metrics.read_routing(run)


def test_object_arrays_are_never_unpickled(run: Path) -> None:
    np.save(run / "domain_loads/step-00000005.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(MoestroError, match="damaged"):
        metrics.read_domain_loads(run)


def test_another_model_or_other_domains_are_refused(run: Path) -> None:
    with pytest.raises(MoestroError, match="other layers or experts"):
        RunLog.open(run, LAYERS, E + 1, resume_step=5)
    log = RunLog.open(run, LAYERS, E, resume_step=5)
    with pytest.raises(MoestroError, match="this evaluation has"):
        log.evaluation(record(6, domains={"fr": {}}), np.zeros((1, 3, E)))
    log.close()


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path, [], 0)
    log.step(record(1, loss=math.nan, lr=math.inf, extra=[np.float32("nan"), {"a": -math.inf}]), None, None)
    log.step(record(2, max_vio=np.float32(0.5), text="\ud800"), None, None)
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["loss"], first["lr"], first["extra"]) == (None, None, [None, {"a": None}])
    assert second["max_vio"] == 0.5


def test_a_dense_model_has_no_routing_files(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path, [], 0)
    log.step(record(1), None, None)
    log.evaluation({"step": 1, "domains": {"en": {}}}, None)
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evals.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
    ]
    assert len(metrics.read_routing(tmp_path)) == 0


def test_wrong_records_and_shapes_are_refused(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path, LAYERS, E)
    with pytest.raises(ValueError, match="lacks grad_norm"):
        log.step({key: 1 for key in metrics.STEP_KEYS if key != "grad_norm"}, None, None)
    with pytest.raises(ValueError, match=r"loads must be \[3, 4\], got \[4\]"):
        log.step(record(1), np.zeros(4), np.zeros((3, 4)))
    log.close()
    assert metrics.read_metrics(tmp_path) == []


def test_a_full_disk_leaves_whole_records_and_passes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog.open(tmp_path, [], 0)
    log.step(record(1), None, None)

    class FullDisk(metrics.io.FileIO):
        def write(self, data: Any) -> int:
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return super().write(data[:-10])

    monkeypatch.setattr(log, "_metrics", FullDisk(tmp_path / "metrics.jsonl", "a"))
    with pytest.raises(OSError, match="No space left"):
        log.step(record(2), None, None)
    assert len(metrics.read_metrics(tmp_path)) == 1
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    metrics.write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        metrics.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_scalars_flatten_numbers_only() -> None:
    value = {
        "step": 3,
        "loss": 2,
        "lr": math.nan,
        "text": "x",
        "none": None,
        "domains": {"ko": {"loss": np.float32(1)}},
    }
    assert metrics.scalars(value, "eval") == {"eval/loss": 2.0, "eval/domains/ko/loss": 1.0}


def test_tensorboard_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def summary_writer(log_dir: str, purge_step: int | None) -> SimpleNamespace:
        calls.append((log_dir, purge_step))
        return SimpleNamespace(add_scalar=lambda *a: calls.append(a), close=lambda: calls.append(("close",)))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = summary_writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    mirror = metrics.TensorBoardMirror(tmp_path, resume_step=6)
    mirror.write({"step": 7, "loss": 1.5}, "train")
    mirror.close()
    assert calls == [(str(tmp_path / "tensorboard"), 7), ("train/loss", 1.5, 7), ("close",)]


def test_trackio_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module = ModuleType("trackio")
    module.init = lambda **kwargs: calls.append(kwargs)  # type: ignore[attr-defined]
    module.log = lambda values, step: calls.append((values, step))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append("finish")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    mirror = metrics.TrackioMirror(tmp_path)
    mirror.write({"step": 7, "loss": 1.5}, "train")
    mirror.close()
    opening = {"project": "moestro", "name": tmp_path.name, "resume": "never"}
    assert calls == [opening, ({"train/loss": 1.5}, 7), "finish"]


def test_missing_extras_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"tensorboard is missing: .* -m pip install .*tensorboard"):
        metrics.TensorBoardMirror(tmp_path)
    with pytest.raises(ConfigError, match=r"trackio is missing: .* -m pip install .*trackio"):
        metrics.TrackioMirror(tmp_path)
