"""Bits per byte of a model on text, per domain, with the experts that each domain chose.

Bits per byte = Σ nll / (ln 2 · bytes of the predicted text): comparable between tokenizers and with compressors.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.data.batches import PADDING, Batch, evaluation_batches
from moestro.data.corpus import iterate_documents
from moestro.data.shards import ShardSet, Split, open_shards, prepare
from moestro.engine.language_model import LanguageModel, load
from moestro.engine.runtime import Runtime, Texts
from moestro.errors import ConfigError, DataError
from moestro.model.transformer import Transformer
from moestro.routing.balance import count_loads
from moestro.training.loss import Counts, attention_batch, compute_loss

Domains = Mapping[str, Callable[[], Iterator[Batch]]]  # name -> a function that starts its batches anew


@dataclass(frozen=True)
class Score:
    """Sums over predicted tokens: nll in nats, tokens, bytes of text; loads [L, E]."""

    nll: float
    tokens: int
    text_bytes: int
    loads: NDArray[np.int64]

    def record(self) -> dict[str, Any]:
        """`bits_per_byte`, `loss` in nats per token, `tokens`, `bytes`."""
        return {
            "bits_per_byte": self.nll / math.log(2) / max(self.text_bytes, 1),
            "loss": self.nll / max(self.tokens, 1),
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }


@torch.no_grad()
def score_batches(model: Transformer, batches: Iterable[Batch], token_bytes: Tensor) -> Score:
    """Score every target once."""
    model.eval()
    nll, tokens, text_bytes = 0.0, 0, 0
    loads = torch.zeros(len(model.routers()), model.config.num_experts, dtype=torch.int64)
    for batch in batches:
        result = compute_loss(model, batch, Counts.of([batch], len(model.mtp)), mtp_weight=0.0)
        targets = batch.targets(0)
        valid = targets >= 0
        nll += float(result.nll.sum(dtype=torch.float64))
        tokens += int(valid.sum())
        text_bytes += int(token_bytes[targets[valid]].sum())
        loads += result.loads
    return Score(nll, tokens, text_bytes, loads.numpy())


@torch.inference_mode()
def score_served(runtime: Runtime, batches: Iterable[Batch], token_bytes: Tensor) -> Score:
    """The same with the served model: packed weights, attention over pages. MTP modules do not take part."""
    nll, tokens, text_bytes = 0.0, 0, 0
    config = runtime.config
    loads = torch.zeros(len(config.moe_layers), config.num_experts, dtype=torch.int64)
    for_counts, for_scores = itertools.tee(batches)
    for batch, scores in zip(for_counts, runtime.score(map(texts_of, for_scores)), strict=True):
        targets = batch.targets(0).flatten()
        valid, present = targets >= 0, (batch.segments[:, :-1] != PADDING).flatten()
        nll += float(scores.nll.sum(dtype=torch.float64))
        tokens += int(valid.sum())
        text_bytes += int(token_bytes[targets[valid]].sum())
        for layer, ids in enumerate(scores.ids):
            loads[layer] += count_loads(ids, config.num_experts, present)
    return Score(nll, tokens, text_bytes, loads.numpy())


def texts_of(batch: Batch) -> Texts:
    """The documents of a batch as separate texts."""
    starts = attention_batch(batch, mask_documents=True).starts.tolist()
    return Texts(batch.inputs.flatten(), starts, batch.targets(0).flatten())


def score_domains(
    model: Transformer | Runtime, domains: Domains, token_bytes: Tensor
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The evaluation record `{loss, bits_per_byte, tokens, domains}` and loads [domains, L, E]."""
    if isinstance(model, Runtime):
        scores = {name: score_served(model, batches(), token_bytes) for name, batches in domains.items()}
    else:
        scores = {name: score_batches(model, batches(), token_bytes) for name, batches in domains.items()}
    whole = Score(
        sum(s.nll for s in scores.values()),
        sum(s.tokens for s in scores.values()),
        sum(s.text_bytes for s in scores.values()),
        np.zeros(0, dtype=np.int64),
    )
    record = whole.record() | {"domains": {name: score.record() for name, score in scores.items()}}
    return record, np.stack([score.loads for score in scores.values()])


EVALUATION_ROWS = 16  # sequences per forward pass


def evaluate(
    model: LanguageModel | str | Path,
    data: str | Path | None = None,
    *,
    split: str = "auto",
    max_tokens: int | None = None,
    seq_len: int = 512,
) -> dict[str, Any]:
    """Bits per byte and loss (nats per token) on text, overall and per domain.

    `model`: one that `load` gave, or what it takes. `data`: what training takes; without it, the documents that the
    run held out. `split`: all documents, or valid, those that training on the same source holds out; auto is valid for
    the built-in corpus and a run's own text, else all. At most `max_tokens` per domain, each token predicted from at
    most `seq_len` before it.

    Returns {"bits_per_byte", "loss", "tokens", "bytes", "domains": {name: the same four}}. DataError if there is no
    text; ConfigError for numbers out of range.
    """
    for name, number, least in (("seq_len", seq_len, 2), ("max_tokens", max_tokens, 1)):
        if number is not None and number < least:
            raise ConfigError(f"{name} must be at least {least}, not {number}")
    if split not in ("auto", "all", "valid"):
        raise ConfigError(f"split must be auto, all or valid, not '{split}'")
    language_model = model if isinstance(model, LanguageModel) else load(model)
    source = language_model.source
    if isinstance(source, Transformer) and data is None:
        raise DataError("this model was not loaded from a run: say what to evaluate on")
    run = Path() if isinstance(source, Transformer) else source.directory
    with tempfile.TemporaryDirectory(prefix="moestro-") as scratch:
        return score_source(
            language_model,
            None if data is None else str(data),
            run=run,
            split=split,
            seq_len=min(seq_len, language_model.max_context or language_model.config.max_seq_len),
            max_tokens=max_tokens,
            scratch=Path(scratch),
        )


def score_source(
    language_model: LanguageModel,
    source: str | None,
    *,
    run: Path,
    split: str,
    seq_len: int,
    max_tokens: int | None,
    scratch: Path,
) -> dict[str, Any]:
    """Evaluate on a source of text, or on the run's held-out text if `source` is None; see `open_domains`.

    Uses the served model if the language model's `weights` say how to pack it, or its cache is not in the type of
    activations, else the training forward pass.
    """
    domains = open_domains(
        language_model, source, run=run, split=split, seq_len=seq_len, max_tokens=max_tokens, scratch=scratch
    )
    as_served = language_model.weights or language_model.cache != "auto"
    model = language_model.runtime if as_served else language_model.model
    token_bytes = pad_token_bytes(language_model.tokenizer.token_bytes, model.config.vocab_size)
    record, _ = score_domains(model, domains, token_bytes)
    return record


def open_domains(
    language_model: LanguageModel,
    source: str | None,
    *,
    run: Path,
    split: str,
    seq_len: int,
    max_tokens: int | None,
    scratch: Path,
) -> Domains:
    """The batches of each domain of a source of text, or of the run's held-out text if `source` is None.

    `split` is "all", "valid" or "auto" (valid for the built-in corpus and a run's own data). Shards are made in
    `scratch`. Raises DataError if there is nothing to evaluate on.
    """
    if source is None:
        shards = open_shards(find_run_shards(run))
        splits: list[Split] = ["train", "valid"] if split == "all" else ["valid"]
    else:
        shards = prepare(iterate_documents(source), language_model.tokenizer, scratch / "shards", 0.02)
        valid_only = split == "valid" or (split == "auto" and source == "builtin")
        splits = ["valid"] if valid_only else ["train", "valid"]
    domains = {
        domain: partial(_chain_splits, shards, domain, splits, seq_len, max_tokens)
        for domain in shards.domains
        if any(shards.num_tokens(domain, split) > 1 for split in splits)
    }
    if not domains:
        raise DataError("there is no held-out text to evaluate on", hint="give --data PATH or --split all")
    return domains


def _chain_splits(
    shards: ShardSet, domain: str, splits: list[Split], seq_len: int, max_tokens: int | None
) -> Iterator[Batch]:
    left = max_tokens
    for split in splits:
        for batch in evaluation_batches(
            shards, domain, split=split, batch_size=EVALUATION_ROWS, seq_len=seq_len, max_tokens=left
        ):
            yield batch
            if left is not None:  # for the next split
                left -= int((batch.targets() >= 0).sum())


def find_run_shards(model: Path) -> Path:
    """The shards of a run; `model` is the run or one of its checkpoints."""
    for run in (model, model.resolve().parent.parent):
        if (run / "data" / "shards" / "index.json").exists():
            return run / "data" / "shards"
    raise DataError(f"{model} is not a run with data of its own", hint="say what to evaluate on with --data")


def pad_token_bytes(token_bytes: NDArray[np.int32], vocab_size: int) -> Tensor:
    """Text bytes per token id [V]; ids beyond the tokenizer's stand for no text."""
    padded = torch.zeros(max(vocab_size, len(token_bytes)), dtype=torch.int64)
    padded[: len(token_bytes)] = torch.from_numpy(token_bytes.astype(np.int64))
    return padded
