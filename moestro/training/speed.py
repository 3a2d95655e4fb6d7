"""How fast this machine trains a model: a few real steps on random tokens."""

from __future__ import annotations

import time

import torch

from moestro.config import Config
from moestro.data.batches import Batch
from moestro.training.prepare import build_model
from moestro.training.step import train_step

STEPS = 2  # timed ones, after one that warms up
ENOUGH_SECONDS = 2.0  # of timed steps; one may take longer


def time_step(config: Config) -> float:
    """Seconds of one training step of `config`, whose precision is resolved; takes about three steps' time.

    One forward pass is timed, and the step is `train.accumulate` of them. Random tokens choose their experts evenly, as
    text does once the routers are balanced.
    """
    train = config.train
    model, optimizers = build_model(config)
    generator = torch.Generator().manual_seed(0)
    shape = (train.batch_size, train.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    batch = Batch(tokens, torch.zeros_like(tokens))
    token_bytes = torch.ones(config.model.vocab_size, dtype=torch.int32)
    seconds: list[float] = []
    while len(seconds) < 1 + STEPS and sum(seconds[1:]) < ENOUGH_SECONDS:
        start = time.perf_counter()
        train_step(
            model,
            optimizers,
            [batch],
            train,
            token_bytes=token_bytes,
            lr=0.0,
            mtp_weight=train.mtp_weight,
            bias_speed=0.0,
        )
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) * train.accumulate
