"""A synthetic comparison of realistic shapes: what `moestro compare` leaves behind, without training anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIGURES = (
    *("steps", "tokens", "seconds", "tokens_per_second", "bits_per_byte", "loss", "domains", "max_vio_batch"),
    *("max_vio_global", "max_over_mean", "load_cv", "entropy", "dead_experts", "dropped", "mtp_agreement", "curve"),
)
DOMAINS = {"english": 1.0, "korean": 0.82, "classical-chinese": 1.32, "mathematics": 0.71, "python": 0.66}
# label: (scheme, final bits per byte, tokens per second, MaxVio, dropped, experts, top_k, shared)
CELLS: dict[str, tuple[str, float, float, float, float | None, int, int, int]] = {
    "dense": ("dense", 2.165, 23900, 0, None, 0, 0, 0),
    "switch": ("switch", 2.118, 18200, 0.62, 0.031, 8, 1, 0),
    "glam": ("glam", 2.096, 17100, 0.48, 0.012, 16, 2, 0),
    "deepseek-moe": ("deepseek-moe", 2.071, 14800, 0.83, 0.0, 62, 6, 2),
    "deepseek-v3": ("deepseek-v3", 2.064, 14500, 0.21, 0.0, 71, 8, 1),
    "no-shared=deepseek-v3": ("deepseek-v3", 2.082, 14900, 0.27, 0.0, 72, 8, 0),
}


def record_of(label: str, seed: int, status: str = "finished", **more: Any) -> dict[str, Any]:
    """A record of one cell without any figure."""
    return {
        "label": label, "scheme": "dense", "overrides": [], "seed": seed, "status": status, "error": None,
        "run": f"cells/x/seed-{seed}", "parameters": {"total": 1000, "active": 1000}, "flops_per_token": 2000,
        "training_flops_per_token": 6000, "cache_bytes_per_token": 640, "num_experts": 0, "top_k": 0,
        "num_shared_experts": 0, "expert_dim": 0, "dense_dim": 512,
    } | dict.fromkeys(FIGURES) | more  # fmt: skip


def finished(label: str, seed: int, bits: float, **more: Any) -> dict[str, Any]:
    """A finished record whose curve falls in a straight line from twice its final value."""
    points = (1, 2, 3, 4, 5)
    curve = {
        "tokens": [1000 * point for point in points],
        "seconds": [10.0 * point for point in points],
        "flops": [6_000_000 * point for point in points],
        "bits_per_byte": [bits * (2 - (point - 1) / 4) for point in points],
    }
    figures: dict[str, Any] = {
        "steps": 50, "tokens": 5000, "seconds": 50.0, "tokens_per_second": 100.0, "bits_per_byte": bits,
        "loss": bits * 2, "domains": {"english": bits, "python": bits / 2}, "curve": curve,
    }  # fmt: skip
    return record_of(label, seed, **(figures | more))


def write_files(directory: Path, records: Sequence[dict[str, Any]], kind: str = "tokens", **changes: Any) -> Path:
    """compare.json and results.jsonl."""
    request: dict[str, Any] = {
        "version": 1,
        "routers": ",".join(dict.fromkeys(record["label"] for record in records)),
        "cells": list(dict.fromkeys(record["label"] for record in records)),
        "seeds": list(dict.fromkeys(record["seed"] for record in records)),
        "budget": {"kind": kind, "value": 2e7, "text": "10m" if kind == "seconds" else "20Mtok"},
        "preset": "compare",
        "command": "moestro compare --routers dense,switch --seeds 3 --budget 20Mtok --out runs/routers",
        "machine": "AMD EPYC 9B14", "threads": 2, "jobs": 1, "commit": "7eb6c8d5",
        "versions": {"moestro": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "settings": {"model": {"hidden_dim": 128, "num_layers": 4}, "train": {"lr": 0.003}},
        "expansion": 8,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "compare.json").write_text(json.dumps(request | changes), "utf-8")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (directory / "results.jsonl").write_text(lines, "utf-8")
    return directory


def realistic(seeds: int = 3, seconds: float = 600) -> list[dict[str, Any]]:
    """Six cells trained for equal seconds; one run failed."""
    records = []
    for index, (label, (scheme, final, speed, vio, dropped, experts, top_k, shared)) in enumerate(CELLS.items()):
        for seed in range(seeds):
            rng = np.random.default_rng([index, seed])
            luck = np.random.default_rng(seed).normal(0, 0.006) + rng.normal(0, 0.003)
            pace = speed * (1 + rng.normal(0, 0.01))
            at = np.linspace(seconds / 9, seconds, 9)
            bits = final + luck + 2.6 * np.exp(-at / seconds * 7) + 0.5 * (1 - at / seconds) ** 2
            training, tokens = 3 * 2_950_000, at * pace
            routed: dict[str, Any] = {}
            if experts:
                noise = rng.normal(0, 0.02)
                routed = {
                    "max_vio_batch": vio + 0.3 + noise, "max_vio_global": vio + noise, "max_over_mean": 1 + vio + noise,
                    "load_cv": vio / 2.4 + noise, "entropy": 1 - vio**2 * 0.06 + noise / 100,
                    "dead_experts": int(vio > 0.8) + seed % 2 * int(vio > 0.6),
                    "dropped": None if dropped is None else dropped * (1 + noise),
                }  # fmt: skip
            share = {name: level * float(bits[-1]) * (1 + rng.normal(0, 0.006)) for name, level in DOMAINS.items()}
            records.append(
                record_of(
                    label, seed, scheme=scheme, num_experts=experts, top_k=top_k, num_shared_experts=shared,
                    overrides=["num_shared_experts=0"] if "no-shared" in label else [],
                    parameters={"total": 1_490_000 + 62_000 * experts, "active": 1_490_000 + 900 * experts},
                    flops_per_token=2_950_000 + 9_000 * index, training_flops_per_token=training,
                    cache_bytes_per_token=640, expert_dim=512 // (top_k + shared) if experts else 0, steps=4000,
                    tokens=int(tokens[-1]), seconds=seconds, tokens_per_second=pace, bits_per_byte=float(bits[-1]),
                    loss=float(bits[-1]) * 2.1, domains=share,
                    curve={"tokens": [int(value) for value in tokens], "seconds": at.tolist(),
                           "flops": [int(value) * training for value in tokens], "bits_per_byte": bits.tolist()},
                    **routed,
                )
            )  # fmt: skip
    failed = record_of("no-shared=deepseek-v3", seeds - 1, "failed", scheme="deepseek-v3", num_experts=72, top_k=8)
    error = "the loss was not finite in 20 steps one after the other; lower train.lr or set train.precision to fp32"
    records[-1] = {**records[-1], **failed, "error": error, "expert_dim": 64}
    return records
