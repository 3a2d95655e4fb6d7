"""Attention in training: native kernels beside plain torch and torch's own flash attention, same inputs, in turn.

    python bench/attention.py [--rounds 9] [--threads 2] [--only bench/train] [--types fp32]

Products over causal pairs are counted, forward 2·(K + W) operations a pair and head, backward 2·(3K + 2W), whatever an
implementation computes besides. Printed for each shape and precision: median GFLOP/s of forward and of backward with
their spread, the native kernels' ratio to the better of the others, and their share of the fp32 peak in registers.
torch: `ops/training/fused.py`; sdpa: a call of `scaled_dot_product_attention` for every document, or one for all where
they are equally long. One thread is timed in CPU time, which other work on a shared machine disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro import machine
from moestro.ops import library
from moestro.ops.training import operators

Attention = Callable[[Tensor, Tensor, Tensor, list[int], float], Tensor]


@dataclass(frozen=True)
class Shape:
    """Lengths of documents, heads, widths of keys and of values."""

    lengths: list[int]
    heads: int
    key: int
    value: int

    @property
    def pairs(self) -> float:
        """Of a query and a key that it sees, all heads."""
        return self.heads * sum(n * (n + 1) / 2 for n in self.lengths)


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIXED = [1, 3, 8192, 700, 40, 1500, 9, 260, 64, 2100, 18, 513, 1, 130]
SHAPES = {
    "bench/train": Shape([512] * 16, 4, 64, 64),
    "DeepSeek, 2048": Shape([2048] * 2, 4, 192, 128),
    "DeepSeek, 8192": Shape([8192], 2, 192, 128),
    "mixed, 1 to 8192": Shape(MIXED, 2, 64, 64),
    "short, 1 to 63": Shape([*range(1, 64)] * 4, 4, 64, 64),
}


def sdpa(q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float) -> Tensor:
    """torch's attention, document by document."""
    lengths = [last - first for first, last in itertools.pairwise(starts)]
    parts = [lengths] if len(set(lengths)) == 1 else [[n] for n in lengths]
    out, first = [], 0
    for part in parts:
        rows = slice(first, first + sum(part))
        qs, ks, vs = (t[rows].unflatten(0, (len(part), -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scale)
        out.append(mixed.transpose(1, 2).flatten(0, 1))
        first = rows.stop
    return torch.cat(out)


def run_attention(form: str, q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float) -> Tensor:
    """The operation computed by one form."""
    out: Tensor = operators.AttentionFunction.apply(q, k, v, torch.tensor(starts), scale, form)[0]
    return out


ATTENTIONS: dict[str, Attention] = {
    "native": partial(run_attention, "native"),
    "torch": partial(run_attention, "torch"),
    "sdpa": sdpa,
}


def clock() -> float:
    """Seconds."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def make_step(attention: Attention, shape: Shape, dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    """A function that runs forward and backward once and returns the seconds of each."""
    generator = torch.Generator().manual_seed(0)
    starts = [0, *itertools.accumulate(shape.lengths)]

    def random(width: int) -> Tensor:
        return torch.randn(starts[-1], shape.heads, width, generator=generator).to(dtype)

    inputs = [random(width).requires_grad_() for width in (shape.key, shape.key, shape.value)]
    grad, (q, k, v) = random(shape.value), inputs

    def step() -> tuple[float, float]:
        begin = clock()
        out = attention(q, k, v, starts, shape.key**-0.5)
        middle = clock()
        torch.autograd.grad(out, inputs, grad)
        return middle - begin, clock() - middle

    return step


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """GFLOP/s of forward and of backward of every implementation, round by round."""
    steps = {name: make_step(attention, shape, dtype) for name, attention in ATTENTIONS.items()}
    forward, backward = 2 * (shape.key + shape.value), 2 * (3 * shape.key + 2 * shape.value)
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            times = step()
            if turn == 0:  # to warm up
                continue
            for kept, operations, seconds in zip(rates[name], (forward, backward), times, strict=True):
                kept.append(operations * shape.pairs / seconds / 1e9)
    return rates


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=machine.usable_threads())
    parser.add_argument("--only", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--types", nargs="+", choices=[*TYPES], default=[*TYPES])
    options = parser.parse_args()
    machine.keep_freed_memory()
    torch.set_num_threads(options.threads)
    described, peak = machine.describe_machine(), library.measure_peak(torch.float32, seconds=4) / 1e9
    kernels = library.current_isa() or "none"
    print(f"{described.cpu}, {options.threads} threads, torch {described.torch}, kernels {kernels}")
    print(f"fp32 peak in registers: {peak:.0f} GFLOP/s\n")
    print(f"{'shape':<18} {'':<14} {'native':>16} {'torch':>16} {'sdpa':>16} {'ratio':>6} {'of peak':>8}")
    for name in options.only:
        for label in options.types:
            rates = measure(SHAPES[name], TYPES[label], options.rounds)
            for i, way in enumerate(("forward", "backward")):
                all_of = [pair[i] for pair in rates.values()]
                middle = [statistics.median(values) for values in all_of]
                texts = [f"{m:.0f} ({min(v):.0f}–{max(v):.0f})" for m, v in zip(middle, all_of, strict=True)]
                columns = " ".join(f"{text:>16}" for text in texts)
                ratio = middle[0] / max(middle[1:])
                print(
                    f"{name:<18} {label + ' ' + way:<14} {columns} {ratio:>6.2f} {middle[0] / peak:>8.0%}", flush=True
                )


if __name__ == "__main__":
    main()
