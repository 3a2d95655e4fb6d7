"""`moestro eval`: bits per byte of a model on text, per domain."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moestro.cli.models import Download, Model, choose_model
from moestro.cli.output import print_json, print_rows
from moestro.cli.process import AS_STORED, Loading, Threads, use_threads


def evaluate(
    model: Model = None,
    *,
    data: str | None = None,
    split: str = "auto",
    max_tokens: int | None = None,
    seq_len: int = 512,
    download: Download = False,
    loading: Loading = AS_STORED,
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure bits per byte and loss on text, overall and per domain.

    Parameters
    ----------
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
    from moestro.training.evaluate import evaluate as score

    directory = choose_model(model, download, "eval")
    use_threads(threads)
    language_model = loading.load(directory)
    record = score(language_model, data, split=split, max_tokens=max_tokens, seq_len=seq_len)
    if json_output:
        print_json(record)
        return
    rows = [(name, f"{score['bits_per_byte']:.4f}") for name, score in record["domains"].items()]
    print_rows([("domain", "bits per byte"), *rows, ("all", f"{record['bits_per_byte']:.4f}")])
