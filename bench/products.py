"""Serving kernels at Moonlight's shapes, each beside the machine's limit measured in the same run.

    python bench/products.py [--rounds 15] [--only linear experts heads attention] [--rows 1 4 16 64 512]

The limit of a call is the larger of its bytes over the measured read bandwidth and its operations over the measured
bf16 product peak (twice that for int8 and int4, whose instruction does twice the work).
Weights are taken in turn from more memory than the caches hold, so that few rows pay for reading them. Printed:
median and best time of a call, and the rates and shares at the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from limits import measure_limits

from moestro import machine
from moestro.ops import library
from moestro.ops.serving.attention import paged_attention
from moestro.ops.serving.rows import rms_norm, route, swiglu
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear
from moestro.routing.selection import Selection

HIDDEN, EXPERTS, WIDTH, TOP_K, HEADS, LATENT, ROPE, NOPE, VALUE = 2048, 64, 1408, 6, 16, 512, 64, 128, 128
FORMATS = ("bf16", "int8", "fp8", "int4")
PAST_CACHES = 160 * 2**20  # bytes of weights that are taken in turn
CONTEXTS = (512, 4096)


@dataclass(frozen=True)
class Case:
    """One call: what it reads from memory at least, what it computes, and at which peak."""

    name: str
    format: str
    rows: int
    nbytes: float
    operations: float
    call: Callable[[], object]


def random(*shape: int) -> torch.Tensor:
    """Bf16 noise."""
    return torch.randn(shape, dtype=torch.bfloat16)


def linear_cases(rows: list[int]) -> Iterator[Case]:
    """The projections of a layer, of which the smallest one is hardest to keep busy."""
    for name, out, inner in (("q, kv down", 16 * 192 + 576, HIDDEN), ("out", HIDDEN, HEADS * VALUE)):
        weight = random(out, inner) / inner**0.5
        for format in FORMATS:
            first = PackedLinear.pack(weight, format)
            copies = [first, *(PackedLinear.pack(weight, format) for _ in range(PAST_CACHES // first.nbytes))]
            for n in rows:
                x, turn = random(n, inner), cycle(copies)
                yield Case(name, format, n, first.nbytes, 2.0 * n * out * inner, lambda t=turn, x=x: next(t)(x))  # type: ignore[misc]


def expert_cases(rows: list[int]) -> Iterator[Case]:
    """Routed experts, every row with its own random choice of six."""
    gate_up, down = random(EXPERTS, 2 * WIDTH, HIDDEN), random(EXPERTS, HIDDEN, WIDTH)
    for weight in (gate_up, down):
        weight /= weight.shape[2] ** 0.5
    for format in FORMATS:
        packed = PackedExperts.pack(gate_up, down, format)
        for n in rows:
            choices = [torch.rand(n, EXPERTS).topk(TOP_K).indices for _ in range(16)]
            touched = statistics.mean(len(ids.unique()) for ids in choices) / EXPERTS
            x, weights, turn = random(n, HIDDEN), torch.rand(n, TOP_K), cycle(choices)
            operations = 6.0 * n * TOP_K * HIDDEN * WIDTH
            call = lambda t=turn, x=x, w=weights, p=packed: p(x, next(t), w)  # noqa: E731
            yield Case("experts", format, n, packed.nbytes * touched, operations, call)


def head_cases(rows: list[int]) -> Iterator[Case]:
    """Both absorbed products of MLA."""
    for name, out, inner in (("absorb", LATENT, NOPE), ("expand", VALUE, LATENT)):
        weight = random(HEADS, out, inner) / inner**0.5
        copies = [PackedHeads.pack(weight) for _ in range(PAST_CACHES // weight.nbytes)]
        for n in rows:
            x, turn = random(n, HEADS, inner), cycle(copies)
            operations = 2.0 * n * HEADS * out * inner
            yield Case(name, "bf16", n, weight.nbytes, operations, lambda t=turn, x=x: next(t)(x))  # type: ignore[misc]


def attention_cases(rows: list[int]) -> Iterator[Case]:
    """MLA over pages: `rows` sequences of one row each; then one prompt of the context's length."""
    width = LATENT + ROPE
    for context in CONTEXTS:
        for n in [*(n for n in rows if n <= 16), -1]:
            prompt = n < 0
            number, tokens = (1, context) if prompt else (n, n)
            pages = random(number * context // 64, 64, width)
            tables = torch.randperm(len(pages)).int().view(number, -1)
            starts, q = torch.arange(number + 1) * (tokens // number), random(tokens, HEADS, width)
            first = torch.full((number,), context - tokens // number)
            numbers = {"groups": 1, "value_offset": 0, "value_width": LATENT, "scale": 192**-0.5}
            pairs = context * (context + 1) / 2 if prompt else number * context
            call = lambda a=(q, pages, tables, starts, first), k=numbers: paged_attention(*a, **k)  # noqa: E731
            name = f"prompt of {context}" if prompt else f"attend {context}"
            yield Case(name, "bf16", tokens, pages.nbytes, 2.0 * pairs * HEADS * (width + LATENT), call)


def small_cases(rows: list[int]) -> Iterator[Case]:
    """What costs calls rather than work: bytes are those read and written."""
    weight = torch.ones(HIDDEN)
    selection = Selection(
        torch.zeros(EXPERTS), "sigmoid", TOP_K, 1, 1, 2, 1.0, multiply=False, normalize=True, hashed=False
    )
    for n in rows:
        x, logits, both = random(n, HIDDEN), torch.randn(n, EXPERTS), random(n, 2 * WIDTH)
        yield Case("rms_norm", "bf16", n, 2.0 * x.nbytes, 0, lambda x=x: rms_norm(x, weight, 1e-6))  # type: ignore[misc]
        yield Case("swiglu", "bf16", n, 1.5 * both.nbytes, 0, lambda x=both: swiglu(x))  # type: ignore[misc]
        yield Case("route", "fp32", n, 1.0 * logits.nbytes, 0, lambda x=logits: route(x, selection))  # type: ignore[misc]


CASES = {
    "linear": linear_cases,
    "experts": expert_cases,
    "heads": head_cases,
    "attention": attention_cases,
    "small": small_cases,
}


def measure(case: Case, rounds: int) -> list[float]:
    """Seconds of single calls, after two to warm up."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        case.call()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    options = parser.parse_args()
    machine.keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(machine.usable_threads())
    limits, described = measure_limits(6), machine.describe_machine()
    peaks = {"fp32": limits.fp32, "bf16": limits.bf16, "fp8": limits.bf16}
    print(f"{described.cpu}, {described.threads} threads, kernels {library.current_isa() or 'none: plain torch'}")
    print(f"{limits}\n")
    print(f"{'':<15} {'':<5} {'rows':>5} {'median':>10} {'best':>10} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>9}")
    for name in options.only:
        for case in CASES[name](options.rows):
            times = measure(case, options.rounds)
            middle, peak = statistics.median(times), peaks.get(case.format, 2 * peaks["bf16"])
            limit = max(case.nbytes / limits.read, case.operations / peak) / 1e9
            micro = [f"{value * 1e6:.1f} µs" for value in (middle, times[0])]
            rates = f"{case.nbytes / middle / 1e9:>7.1f} {case.operations / middle / 1e9:>8.0f} {limit / middle:>9.0%}"
            print(f"{case.name:<15} {case.format:<5} {case.rows:>5} {micro[0]:>10} {micro[1]:>10} {rates}", flush=True)


if __name__ == "__main__":
    main()
