"""A synthetic run of realistic shapes: loads drifting to balance, biases following, domains with tastes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.routing import stats
from moestro.training.metrics import RunLog

LAYERS = ["1", "2", "3", "4", "5", "mtp.0"]
DOMAINS = {
    "english": (
        "The evening was",
        " quiet, and the old man at the window said nothing of the letter he had read.",
    ),
    "korean": ("옛날 어느 마을에", " 마음씨 고운 나무꾼이 살고 있었는데 하루는 산에서 사슴을 만났다."),
    "classical-chinese": ("子曰", "：「學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？」"),
    "mathematics": (
        "theorem add_comm",
        " (a b : ℕ) : a + b = b + a := by\n  induction b with\n  | zero => simp",
    ),
    "python": (
        "def main(",
        ") -> None:\n    parser = argparse.ArgumentParser()\n    args = parser.parse_args()",
    ),
    "arithmetic": ("12 + 30 =", " 42\n17 * 3 = 51\n100 - 58 = 42"),
}
FINAL_BITS = (1.62, 1.21, 2.05, 0.93, 1.12, 0.74)


def write_run(run: Path, steps: int = 300, num_experts: int = 32, eval_every: int = 25) -> Path:
    """Write the whole log of a run through `RunLog`."""
    rng = np.random.default_rng(3)
    assignments = 8192 * 4
    tilt = rng.gumbel(size=(len(LAYERS), num_experts)) * 0.9
    taste = rng.gamma(0.35, 1.0, (len(DOMAINS), len(LAYERS), num_experts))
    biases = np.zeros((len(LAYERS), num_experts))
    log = RunLog.open(run, LAYERS, num_experts)
    for step in range(1, steps + 1):
        share = np.exp(tilt + biases * 22 + rng.normal(0, 0.08, tilt.shape))
        loads = rng.poisson(share / share.sum(axis=1, keepdims=True) * assignments)
        if step < steps * 0.95:
            biases += 0.001 * np.sign(loads.mean(axis=1, keepdims=True) - loads)
        fraction, tokens = step / steps, step * 8192
        loss = 2.6 + 5.8 * np.exp(-fraction * 9) + 0.9 * np.exp(-fraction * 2.2) + rng.normal(0, 0.05)
        record = {
            "step": step,
            "tokens": tokens,
            "loss": loss + 0.3 * (loss + 0.6) + 1e-4,
            "loss_main": loss,
            "loss_mtp": loss + 0.55 + rng.normal(0, 0.03),
            "loss_balance": 1e-4 * (1 + 0.5 * np.exp(-6 * fraction)),
            "lr": 1e-3 * min(1, step / 20) * (1 if fraction < 0.7 else 1 - (fraction - 0.7) / 0.32),
            "grad_norm": 0.4 + 2.5 * np.exp(-fraction * 20) + rng.gamma(2, 0.06) if step != 90 else float("nan"),
            "tokens_per_second": 21400 + rng.normal(0, 500) - (4000 if step % 60 == 0 else 0),
            "max_vio": float(stats.max_vio(loads).mean()),
            "dead_experts": int(stats.dead_experts(loads).sum()),
            "seconds": step * 0.39,
            "bits_per_byte": loss / 2.9,
            "mtp_agreement": 0.55 * (1 - np.exp(-fraction * 4)),
            "skipped": 0,
        }
        log.step(record, loads, biases)
        if step % eval_every == 0:
            write_evaluation(log, step, fraction, taste, rng)
    log.close()
    about: dict[str, Any] = {
        "preset": "demo",
        "parameters": {"total": 18_412_032, "active": 7_245_824},
        "started": "2026-11-24 09:14",
        "machine": "2 cores of x86-64 with AVX-512, 7.8 GiB",
        "versions": {"moestro": "0.1.0", "torch": "2.13.0", "python": "3.12.4"},
        "command": "moestro train --preset demo --out runs/demo",
        "finished": True,
    }
    (run / "run.json").write_text(json.dumps(about))
    return run


def write_evaluation(log: RunLog, step: int, fraction: float, taste: np.ndarray, rng: np.random.Generator) -> None:
    """One evaluation whose domains prefer experts the more the longer the run."""
    bits = {
        name: final + 2.4 * np.exp(-fraction * 5) + rng.normal(0, 0.012)
        for name, final in zip(DOMAINS, FINAL_BITS, strict=True)
    }
    domains = {
        name: {"bits_per_byte": value, "loss": value * 2.4, "tokens": 16384, "bytes": 52000}
        for name, value in bits.items()
    }
    mean = float(np.mean(list(bits.values())))
    record = {"step": step, "tokens": step * 8192, "seconds": step * 0.39, "loss": mean * 2.4}
    share = 1 + taste * 2.2 * fraction
    loads = rng.poisson(share / share.sum(axis=2, keepdims=True) * 65536)
    log.evaluation(record | {"bits_per_byte": mean, "domains": domains}, loads)
    for name, (prompt, text) in DOMAINS.items():
        log.sample(step, name, prompt, text)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    return write_run(tmp_path_factory.mktemp("runs") / "demo", steps=120)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run of one's own."""
    return lambda **options: write_run(tmp_path / "run", **options)
