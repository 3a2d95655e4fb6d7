"""`moestro convert`: a model directory in another precision, such as FP8 as DeepSeek publishes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from moestro.cli.output import print_json
from moestro.cli.process import IgnoredKeys, Threads, use_threads


def convert(
    model: Path,
    out: Path,
    *,
    to: Literal["fp8", "bf16"],
    scale: Literal["fp32", "ue8m0"] | None = None,
    keys: IgnoredKeys = frozenset(),
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Write a model as a new Hugging Face directory in fp8 or bf16.

    One matrix is in memory at a time.

    Parameters
    ----------
    model
        A run, a checkpoint or a Hugging Face deepseek_v3 or deepseek_v2 directory, quantised or not.
    out
        The directory; it must not exist.
    to
        fp8 has a scale for every 128 x 128 weights, in DeepSeek's layout; bf16 is plain.
    scale
        Scales of fp8: fp32, or ue8m0 for powers of two. As stored without it, fp32 if nothing is fp8 yet.
    json_output
        Print {"model", "weights", "bytes", "kept", "rounded"}: matrices whose codes were kept, and rounded ones.
    """
    from moestro.checkpoints import convert as converting
    from moestro.checkpoints.packed import PackedFiles
    from moestro.engine.language_model import open_source
    from moestro.errors import ConfigError

    use_threads(threads)
    source = open_source(model, "auto", keys)
    if isinstance(source, PackedFiles):
        raise ConfigError(f"{source.directory} is packed for serving: convert the original")
    done = converting.convert(source, out, to, scale)
    if json_output:
        written = {"weights": to, "bytes": done.nbytes, "kept": done.kept, "rounded": done.rounded}
        print_json({"model": str(out), **written})
    else:
        print(f"{out}: {to} weights, {done.nbytes / 1e9:.2f} GB")
