"""Grouped experts, forward and backward: native kernels beside plain torch, same inputs, in turn.

    python bench/experts.py [--rounds 9]

Printed for each shape and precision: median GFLOP/s of both with their spread, the ratio, and the share of the
machine's matrix-product peak in that precision, measured in the same run. A backward pass counts twice its forward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from limits import measure_limits
from torch import Tensor

from moestro import machine
from moestro.ops import library
from moestro.ops.training import operators

# name: tokens, hidden, experts, expert width, active experts
SHAPES = {
    "demo": (2048, 128, 32, 64, 4),
    "bench/train": (8192, 256, 32, 128, 4),
    "compare, 63 experts": (1024, 128, 63, 32, 7),
    "compare, 8 experts": (1024, 128, 8, 256, 1),
}
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def make_step(experts: Experts, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Callable[[], None]:
    """A function that runs forward and backward once on random tokens and a random, uneven routing."""
    tokens, hidden, num_experts, width, top_k = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).requires_grad_()

    x, gate_up, down = (
        random(tokens, hidden),
        random(num_experts, 2 * width, hidden),
        random(num_experts, hidden, width),
    )
    scores = torch.rand(tokens, num_experts, generator=generator) + torch.rand(num_experts, generator=generator) / 2
    ids, weights = scores.topk(top_k).indices, torch.rand(tokens, top_k, generator=generator, requires_grad=True)
    grad = torch.randn(tokens, hidden, generator=generator).to(dtype)

    def step() -> None:
        out = experts(x, gate_up, down, ids, weights)
        torch.autograd.grad(out, (x, gate_up, down, weights), grad)

    return step


def run_experts(form: str, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The operation computed by one form."""
    out: Tensor = operators.ExpertsFunction.apply(x, ids, weights, form, gate_up, down)[0]
    return out


def measure(shape: tuple[int, int, int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """GFLOP/s of each implementation, round by round."""
    steps = {form: make_step(partial(run_experts, form), shape, dtype) for form in ("native", "torch")}
    tokens, hidden, _, width, top_k = shape
    flops = 18 * tokens * top_k * hidden * width  # three products, two flops a pair, forward and twice backward
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            rates[name].append(flops / (time.perf_counter() - start) / 1e9)
    return rates


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    machine.keep_freed_memory()
    torch.set_num_threads(machine.usable_threads())
    limits = measure_limits()
    described = machine.describe_machine()
    kernels = library.current_isa() or "none"
    print(f"{described.cpu}, {described.threads} threads, torch {described.torch}, kernels {kernels}")
    print(f"{limits}\n")
    print(f"{'shape':<22} {'':<5} {'native':>20} {'torch':>20} {'ratio':>6} {'of peak':>8}")
    for name, shape in SHAPES.items():
        for label, dtype, peak in (
            ("fp32", torch.float32, limits.fp32),
            ("bf16", torch.bfloat16, limits.bf16),
        ):
            rates = measure(shape, dtype, options.rounds)
            middle = {key: statistics.median(values) for key, values in rates.items()}
            texts = [f"{middle[key]:.0f} ({min(values):.0f}–{max(values):.0f})" for key, values in rates.items()]
            ratio, share = middle["native"] / middle["torch"], middle["native"] / peak
            print(f"{name:<22} {label:<5} {texts[0]:>20} {texts[1]:>20} {ratio:>6.2f} {share:>8.0%}")


if __name__ == "__main__":
    main()
