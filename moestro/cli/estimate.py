"""The part of `moestro inspect` that says whether a model runs on this machine, and how fast at best."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moestro.config import Config, ModelConfig
from moestro.errors import ConfigError
from moestro.sizes import format_bytes

if TYPE_CHECKING:
    from moestro.checkpoints.packing import Source
    from moestro.machine import Measurement

USUAL_CONTEXT = 4096
TOKENS_PER_PARAMETER = 20  # active ones: about the optimum of compute (Hoffmann et al. 2022)
MEASURING_SECONDS, MEASURED_BYTES = 0.5, 2**29


def estimate(
    model: Source | ModelConfig, config: Config, *, context: int | None, tokens: int | None, measure: bool
) -> dict[str, Any]:
    """{"machine", "context", "serving", "training"}: what fits here, and speeds unless nothing is to be measured."""
    from moestro import machine
    from moestro.checkpoints.packed import PackedFiles
    from moestro.engine.needs import serving_needs
    from moestro.engine.paged_cache import check_context
    from moestro.ops.serving.formats import FORMATS

    sizes = config.model
    context = min(USUAL_CONTEXT, sizes.max_seq_len) if context is None else context
    check_context(sizes, context)
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, not {tokens}")
    usable = machine.usable_bytes()  # before measuring, which fills a buffer
    measured = machine.measure_machine(MEASURING_SECONDS, MEASURED_BYTES) if measure else None
    speed = measured.read_gb_per_second * 1e9 if measured else None
    packed = isinstance(model, PackedFiles)
    formats = [model.format] if isinstance(model, PackedFiles) else list(FORMATS)
    needs = [serving_needs(model, format, context, private=not packed) for format in formats]
    return {
        "machine": {
            "usable_bytes": usable,
            "measured": asdict(measured) if measured else None,
            "is_busy": hasattr(os, "getloadavg") and os.getloadavg()[0] > machine.usable_cores(),
        },
        "context": context,
        "serving": [one.describe(usable, speed) for one in needs],
        "training": describe_training(config, tokens, usable, measured),
    }


def describe_training(config: Config, tokens: int | None, usable: int, measured: Measurement | None) -> dict[str, Any]:
    """Memory by part, and the seconds that the arithmetic of `tokens` takes at the speed of products measured."""
    from moestro.model.size import measure_size, training_flops
    from moestro.training.memory import training_memory

    memory = training_memory(config)
    tokens = tokens or TOKENS_PER_PARAMETER * measure_size(config.model).active
    flops = training_flops(config.model, min(config.train.seq_len, config.model.max_seq_len))
    return {
        **asdict(memory),
        "total": memory.total,
        "fits": memory.total <= usable,
        "tokens": tokens,
        "least_seconds": tokens * flops / (best_gflops(asdict(measured)) * 1e9) if measured else None,
    }


def best_gflops(measured: dict[str, Any]) -> float:
    """The rate of products in the quicker of both precisions."""
    return max(measured["fp32_gflops"], measured["bf16_gflops"])


def list_estimate(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same in names and values for people, in 80 columns."""
    usable, measured = found["machine"]["usable_bytes"], found["machine"]["measured"]
    rows = [("free memory", format_bytes(usable))]
    head = f"{'':5}{'weights':>10}{'cache':>10}{'working':>10}{'total':>10}  {'fits':<5}"
    rows.append(("to serve", head + (f"{'tokens/s':>9}" if measured else "")))
    for one in found["serving"]:
        sizes = "".join(f"{format_bytes(one[key]):>10}" for key in ("weights", "cache", "working", "total"))
        most = one["most_tokens_per_second"]
        speed = "" if not measured else f"{'cached' if most is None else '<=' + format_speed(most):>9}"
        rows.append(("", f"{one['format']:<5}{sizes}  {'yes' if one['fits'] else 'no':<5}{speed}"))
    rows.append(("", f"cache for {found['context']:,} tokens of context"))
    if measured:
        rows.append(("", f"one text, at most: {measured['read_gb_per_second']:.1f} GB/s of memory ÷ bytes read"))
        rows.append(("", "for a token (active weights, cached context), if no cache holds them"))
        if found["machine"]["is_busy"]:
            rows.append(("", "! other programs compute now: a quiet machine is faster"))
    training = found["training"]
    state = sum(training[key] for key in ("weights", "gradients", "moments", "copies"))
    rest = training["activations"] + training["working"]
    rows.append(
        ("to train", f"{format_bytes(training['total'])}, which {'fits' if training['fits'] else 'does not fit'}:")
    )
    rows.append(("", f"{format_bytes(state)} weights, gradients, moments, copies"))
    rows.append(("", f"{format_bytes(rest)} activations of a micro-batch, working memory"))
    if training["least_seconds"] is not None:
        rows.append(("", f"{training['tokens']:,} tokens take at least {format_time(training['least_seconds'])}"))
        rows.append(("", f"(6 operations per active parameter and token, {best_gflops(measured):,.0f} GFLOP/s)"))
    return rows


def format_speed(number: float) -> str:
    """0.0123, 12.3 or 1,234."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def format_time(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
