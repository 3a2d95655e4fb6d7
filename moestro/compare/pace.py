"""How long a comparison will take: its budget of time, or a measured step of every cell times the steps of its runs."""

from __future__ import annotations

import math
import time

import torch

from moestro.compare.plan import Plan
from moestro.config import Config
from moestro.data.batches import Batch
from moestro.machine.memory import memory_bytes
from moestro.model.size import measure_size
from moestro.training.prepare import build_model
from moestro.training.step import train_step

STATE_BYTES = 16  # per parameter: fp32 value, gradient and two moments
SHARE_OF_MEMORY = 0.5  # a model that needs more of what is free is not built for an estimate


def estimate_seconds(plan: Plan) -> float | None:
    """Seconds of training of all runs of a plan, evaluations and starts not included; None if a cell is too large.

    Trains two steps of every cell unless the budget is one of time, with torch's current threads.
    """
    if plan.budget.kind == "seconds":
        rounds = math.ceil(len(plan.cells) * len(plan.seeds) / plan.jobs)
        return rounds * plan.budget.value
    total = 0.0
    for cell in plan.cells:
        config = plan.config(cell, plan.seeds[0])
        if measure_size(config.model).total * STATE_BYTES > SHARE_OF_MEMORY * memory_bytes()[1]:
            return None
        total += time_step(config) * config.train.steps * len(plan.seeds)
    return total / plan.jobs


def time_step(config: Config) -> float:
    """Seconds of the second training step on random tokens; the first one warms up."""
    if config.train.precision == "auto":
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    model, optimizers = build_model(config)
    train = config.train
    tokens = torch.randint(0, config.model.vocab_size, (train.batch_size, train.seq_len + 1))
    batches = [Batch(tokens, torch.zeros_like(tokens))] * train.accumulate
    token_bytes = torch.ones(config.model.vocab_size, dtype=torch.int64)
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        train_step(
            model, optimizers, batches, train,
            token_bytes=token_bytes, lr=train.lr, mtp_weight=train.mtp_weight, bias_speed=0.0,
        )  # fmt: skip
    return time.perf_counter() - start
