"""`moestro pack`: pack a model's weights once and map them at every start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moestro.cli.output import print_json, print_note
from moestro.cli.process import IgnoredKeys, Threads, Weights, use_threads


def pack(
    model: Path,
    *,
    out: Path,
    weights: Weights = None,
    dtype: str = "auto",
    keys: IgnoredKeys = frozenset(),
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Pack weights once; generate, chat, serve and eval then map them instead of loading.

    Parameters
    ----------
    model
        A run, a checkpoint or a Hugging Face deepseek_v3 or deepseek_v2 directory.
    out
        The directory; it must not exist.
    dtype
        What activations are computed in: auto (as stored), fp32 or bf16.
    json_output
        Print {"model", "weights", "dtype", "bytes"}.
    """
    from moestro.engine import language_model

    use_threads(threads)
    packed = language_model.pack(model, out, dtype, weights=weights, log=print_note, ignore_config_keys=keys)
    if json_output:
        kept = {"weights": packed.format, "dtype": packed.dtype, "bytes": packed.nbytes}
        print_json({"model": str(out), **kept})
    else:
        print(f"{out}: {packed.format} weights, {packed.nbytes / 1e9:.2f} GB")
