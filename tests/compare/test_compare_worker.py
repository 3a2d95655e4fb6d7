"""The process that trains one run of a comparison: what it sets for itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moestro.compare import worker
from moestro.config import Config


def test_a_worker_honours_the_threads_of_its_configuration(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr("moestro.machine.use_threads", calls.append)
    monkeypatch.setattr("moestro.machine.keep_freed_memory", lambda: calls.append("malloc"))
    config = tmp_path / "seed-0.json"
    config.write_text(json.dumps(make_config("train.steps=1", "train.threads=2").model_dump(mode="json")))
    assert worker.main(config, tmp_path / "seed-0") == 0
    assert calls == [2, "malloc"]
