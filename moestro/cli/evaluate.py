"""`moestro eval`: bits per byte of a model on text, per domain."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moestro.cli.output import print_json, print_note, print_rows
from moestro.cli.process import Activations, Cache, Dtype, Threads, Weights, use_threads
from moestro.errors import ConfigError, DataError


def evaluate(
    model: Path,
    *,
    data: str | None = None,
    split: str = "auto",
    max_tokens: int | None = None,
    seq_len: int = 512,
    dtype: Dtype = "auto",
    weights: Weights = None,
    cache: Cache = "auto",
    activations: Activations = "auto",
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure bits per byte and loss on text, overall and per domain.

    Parameters
    ----------
    model
        A run, a checkpoint, a Hugging Face deepseek_v3 or deepseek_v2 directory, or packed weights.
    data
        What to evaluate on: like train --data. Without it, the documents that the run held out.
    split
        all for all documents, valid for only those that training on the same source holds out. By default valid for
        the built-in corpus, all for other text.
    max_tokens
        Most tokens to evaluate per domain.
    seq_len
        Context length: every token is predicted from at most this much of its document.
    json_output
        Print {"bits_per_byte", "loss", "tokens", "domains": {…}} on one line.
    """
    from moestro.engine.language_model import load
    from moestro.training.evaluate import score_source

    if split not in ("auto", "all", "valid"):
        raise DataError(f"--split must be auto, all or valid, not '{split}'")
    for name, number, least in (("--seq-len", seq_len, 2), ("--max-tokens", max_tokens, 1)):
        if number is not None and number < least:
            raise ConfigError(f"{name} must be at least {least}, not {number}")
    use_threads(threads)
    language_model = load(model, dtype, weights=weights, cache=cache, activations=activations, log=print_note)
    seq_len = min(seq_len, language_model.config.max_seq_len)
    with tempfile.TemporaryDirectory(prefix="moestro-") as scratch:
        record = score_source(
            language_model,
            data,
            run=model,
            split=split,
            seq_len=seq_len,
            max_tokens=max_tokens,
            scratch=Path(scratch),
        )
    if json_output:
        print_json(record)
        return
    rows = [(name, f"{score['bits_per_byte']:.4f}") for name, score in record["domains"].items()]
    print_rows([("domain", "bits per byte"), *rows, ("all", f"{record['bits_per_byte']:.4f}")])
