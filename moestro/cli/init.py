"""`moestro init`: a random-weight model directory of any preset, for benchmarks and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moestro.cli.output import print_json
from moestro.cli.process import Threads, use_threads
from moestro.config import build_config, load_preset


def init(
    *overrides: str,
    preset: str,
    out: Path,
    seed: int = 0,
    dtype: str = "bf16",
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Write a model directory with random weights, for tests and benchmarks.

    It is streamed in shards, so that memory stays bounded.

    Parameters
    ----------
    overrides
        Settings as model.key=value, such as model.num_layers=8.
    preset
        A shipped configuration.
    out
        The directory; it must be new or empty.
    seed
        The same seed gives the same weights.
    dtype
        bf16 or fp32.
    json_output
        Print {"model", "bytes", "parameters"}.
    """
    from moestro.checkpoints.random_weights import write_random_model

    config = build_config(load_preset(preset), overrides).model
    use_threads(threads)
    written = write_random_model(config, out, seed=seed, dtype=dtype)
    if json_output:
        print_json({"model": str(out), **written})
    else:
        print(f"{out}: {written['parameters']:,} parameters, {written['bytes'] / 1e9:.2f} GB")
