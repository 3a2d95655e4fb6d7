"""What many tests share: a little text, a tiny configuration, one trained run. Everything is made once, offline.

With `pytest -n auto` there is one worker for each usable core, up to `MAX_WORKERS`. A worker and the processes that its
tests start compute with one thread each. Threads that a test asks for sleep while they wait: spinning threads of two
workers, or of a test and anything else on the machine, are ten times slower. Both settings must come before torch.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from moestro.config import Config, build_config
from moestro.data.tokenizer import Tokenizer
from moestro.machine import usable_cores

MAX_WORKERS = 8  # each takes up to 2 GB, and makes the shared fixtures anew

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "ran", "over", "hill", "and", "12", "345", "été", "moon", "tree"]
TINY_MODEL: dict[str, Any] = {
    "vocab_size": 300, "hidden_dim": 32, "num_layers": 2, "num_dense_layers": 1, "dense_dim": 48, "max_seq_len": 128,
    "num_heads": 2, "kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8, "num_experts": 8, "top_k": 2,
    "num_shared_experts": 1, "expert_dim": 16, "mtp_depth": 1,
}  # fmt: skip
TINY_TRAIN: dict[str, Any] = {
    "steps": 12, "seq_len": 32, "batch_size": 4, "warmup_steps": 2, "lr": 3e-3, "precision": "fp32", "threads": 1,
    "checkpoint_every": 5, "keep_checkpoints": 2, "eval_every": 6,
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: xdist itself knows nothing of the quotas of containers."""
    return min(usable_cores(), MAX_WORKERS)


def write_texts(path: Path, count: int = 120, seed: int = 0) -> Path:
    """Documents of a few words, one JSON record a line."""
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "words.jsonl")


@pytest.fixture(scope="session")
def tokenizer(text_file: Path) -> Tokenizer:
    lines = text_file.read_text("utf-8").splitlines()
    return Tokenizer.train([json.loads(line)["text"] for line in lines], 300)


@pytest.fixture(scope="session")
def make_config(text_file: Path) -> Callable[..., Config]:
    """`make_config("train.steps=3", …)`: the tiny configuration with overrides."""

    def make(*overrides: str) -> Config:
        data = {"source": str(text_file), "tokenizer": "train", "valid_fraction": 0.1}
        return build_config({"model": TINY_MODEL, "train": TINY_TRAIN, "data": data}, overrides)

    return make


@pytest.fixture(scope="session")
def tiny_run(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps; not to be changed."""
    from moestro.training.loop import train

    run = tmp_path_factory.mktemp("tiny") / "run"
    train(make_config(), run, quiet=True)
    return run
