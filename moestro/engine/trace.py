"""What a model does with every token of a known text: its experts with their weights, and how well it was predicted.

tokens [N] -> chunks of TokenTrace, in order

A served pass keeps the ids of experts alone. Here the same pass runs operation by operation and keeps the weights, too,
in a cache of its own; nothing that requests compute is touched. The numbers are those of serving, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.engine.paged_cache import PagedCache
from moestro.engine.pages import PAGE_SIZE
from moestro.engine.runtime import Runtime
from moestro.engine.scheduler import pages_for
from moestro.errors import ConfigError, MoestroError


@dataclass(frozen=True)
class Prediction:
    """How a token was predicted from those before it, by the model alone (no temperature, no penalties).

    `logprob` in nats; `rank` is 1 for the likeliest token; `entropy` of the whole distribution in nats; `top`: the
    likeliest tokens (id, logprob).
    """

    logprob: float
    rank: int
    entropy: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenTrace:
    """One token: how it was predicted (None for the first), expert ids [L, A] and their weights [L, A] fp32."""

    token: int
    prediction: Prediction | None
    ids: Tensor
    weights: Tensor


def trace(runtime: Runtime, tokens: Sequence[int], num_top: int = 5) -> Iterator[list[TokenTrace]]:
    """Trace a text of N tokens, a page of them at a time. ConfigError if the model cannot read the text."""
    config = runtime.config
    if not 0 < len(tokens) <= config.max_seq_len:
        raise ConfigError(f"a text to trace has 1 to {config.max_seq_len} tokens, not {len(tokens)}")
    if min(tokens) < 0 or max(tokens) >= config.vocab_size:
        raise ConfigError(f"token ids lie between 0 and {config.vocab_size - 1}")
    cache = PagedCache(config, pages_for(len(tokens)), runtime.dtype, runtime.cache, context=len(tokens))
    before: Tensor | None = None  # logits [V] after the chunk before
    for first in range(0, len(tokens), PAGE_SIZE):
        chunk = tokens[first : first + PAGE_SIZE]
        traces, before = _trace_chunk(runtime, cache, chunk, first, before, num_top)
        yield traces


@torch.inference_mode()
def _trace_chunk(
    runtime: Runtime, cache: PagedCache, chunk: Sequence[int], first: int, before: Tensor | None, num_top: int
) -> tuple[list[TokenTrace], Tensor]:
    """The traces of a chunk that begins at position `first`, and the logits after its last token."""
    pages = range(pages_for(first + len(chunk)))
    output, weights = runtime.watch(cache.prepare([(chunk, first, pages)]), cache)
    logits = runtime.logits(output.hidden)
    rows = logits[:-1] if before is None else torch.cat([before[None], logits[:-1]])
    targets = chunk[1:] if before is None else chunk
    known = _predictions(rows, targets, min(num_top, logits.shape[-1]))
    predictions = [None, *known] if before is None else known
    ids, weights = output.ids.transpose(0, 1), weights.transpose(0, 1)
    return [TokenTrace(*parts) for parts in zip(chunk, predictions, ids, weights, strict=True)], logits[-1]


def _predictions(logits: Tensor, targets: Sequence[int], num_top: int) -> list[Prediction]:
    """logits [N, V] fp32 and the tokens that came -> one prediction a row. MoestroError if they are not finite."""
    if not logits.isfinite().all():
        raise MoestroError("the model's numbers are not finite")
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(targets, dtype=torch.int64)[:, None])
    ranks = (logprobs > own).sum(-1) + 1
    entropies = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)  # a probability of 0 adds nothing
    values, ids = logprobs.topk(num_top)
    tops = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    columns = (own[:, 0].tolist(), ranks.tolist(), entropies.tolist(), tops)
    return [Prediction(*row) for row in zip(*columns, strict=True)]
