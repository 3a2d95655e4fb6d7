"""The precision of a run. Where it may choose, it measures whether fp32 or bf16 is faster for this model.

Instruction sets do not tell: there are CPUs with bf16 instructions whose large bf16 products run at half, the same or
twice the rate of fp32, and small products differ again. So the parts that take most of a step are timed in both, at
the model's own shapes: the experts of one layer and the output head, forward and backward.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from moestro import ops
from moestro.config import Config, ModelConfig
from moestro.model.layers import MLP
from moestro.ops.precision import Fp8Recipe, PlainPrecision, Precision, compute_dtype

ROUNDS = 2
MAX_TOKENS = 4096  # enough to fill the experts as a step does, few enough to take a second or two


def precision_from(config: Config) -> Precision:
    """What layers take for a resolved `train.precision`."""
    chosen = config.train.precision
    assert chosen != "auto"
    return Fp8Recipe(**config.fp8.model_dump()) if chosen == "fp8" else chosen


def resolve_precision(config: Config) -> str:
    """What `train.precision` says, or under `auto` `bf16` or `fp32`, the one with the shorter measured steps."""
    if config.train.precision != "auto":
        return config.train.precision
    if not ops.multiplies_bf16():
        return "fp32"
    tokens = min(config.train.batch_size * config.train.seq_len, MAX_TOKENS)
    seconds: dict[PlainPrecision, float] = {"fp32": float("inf"), "bf16": float("inf")}
    for _ in range(1 + ROUNDS):  # the first round warms up; the shortest time counts
        for precision in seconds:
            seconds[precision] = min(seconds[precision], time_hot_path(config.model, tokens, precision))
    return min(seconds, key=lambda precision: seconds[precision])


def time_hot_path(config: ModelConfig, tokens: int, precision: PlainPrecision) -> float:
    """Seconds of all feed-forward layers and heads of one step of `tokens`, extrapolated from one of each."""
    dtype = compute_dtype(precision)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(dtype).requires_grad_()

    x, head = random(tokens, config.hidden_dim), random(config.vocab_size, config.hidden_dim)
    targets = torch.zeros(tokens, dtype=torch.int64)
    start = time.perf_counter()
    ops.linear_cross_entropy(x, head, targets)  # computes the gradients, too
    head_seconds = time.perf_counter() - start
    if config.num_experts:
        width = config.expert_dim
        gate_up = random(config.num_experts, 2 * width, config.hidden_dim)
        down = random(config.num_experts, config.hidden_dim, width)
        ids = torch.randint(0, config.num_experts, (tokens, config.top_k), generator=generator)
        start = time.perf_counter()
        ops.grouped_experts(x, gate_up, down, ids, torch.ones(ids.shape)).sum().backward()
    else:
        mlp = MLP(config.hidden_dim, config.dense_dim, precision)
        start = time.perf_counter()
        mlp(x).sum().backward()
    layers_seconds = (time.perf_counter() - start) * (config.num_layers + config.mtp_depth)
    return layers_seconds + head_seconds * (1 + config.mtp_depth)
