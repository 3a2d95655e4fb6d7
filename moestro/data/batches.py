"""Shards to batches: `(packer, state) -> (batch, state)`, a pure function whose whole memory is `PackState`.

A document is cut into pieces of at most `seq_len + 1` tokens with stride `seq_len`, so every token but the first
is a target exactly once per epoch. The next piece comes from the domain that lags furthest behind its share,
`weight * total - emitted`. So shares hold without randomness, and no domain runs ahead by more than a piece.
Each epoch shuffles a domain's pieces anew, by the argsort of a counter-based generator's raw output. Unlike a
library's `shuffle`, no later version may change that.

Rows of `seq_len + 1` tokens are filled with pieces back to back. A piece that does not fit continues in the next
row, with one token repeated: no target is lost and nothing is padded, but its context is cut in two. A row's last
slot is never an input; if a piece gets only that slot, the next row starts with the whole piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moestro.data.shards import ShardSet, Split
from moestro.errors import DataError

IGNORED = -100  # the target of positions without one: cross_entropy's default
PADDING = -1  # the segment of padding

Span = tuple[int, int, int]  # domain number, first token and end of a slice of one document


@dataclass(frozen=True)
class Batch:
    """Token ids, and for each token the number of its piece within the row; both int64 [B, seq_len + 1].

    Segment `PADDING` marks padding, which only evaluation has. `weights` fp32 [B, seq_len + 1] says how much each token
    counts as a target; None: all 1. A token of weight 0 is no target.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    weights: torch.Tensor | None = None

    def rows(self, part: slice) -> Batch:
        """Some of the rows."""
        return Batch(self.tokens[part], self.segments[part], None if self.weights is None else self.weights[part])

    def to(self, device: torch.device | str) -> Batch:
        """This batch on another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return Batch(self.tokens.to(device), self.segments.to(device), weights)

    @property
    def inputs(self) -> torch.Tensor:
        """What the model reads, [B, seq_len]."""
        return self.tokens[:, :-1]

    def targets(self, k: int = 0) -> torch.Tensor:
        """The token `k + 1` ahead of each input, [B, seq_len]; `IGNORED` beyond its segment or row.

        `k` is the MTP depth: 0 for the main head.
        """
        targets = torch.full_like(self.inputs, IGNORED)
        width, ahead = self.tokens.shape[1], k + 1
        if ahead < width:
            same = (self.segments[:, :-ahead] == self.segments[:, ahead:]) & (self.segments[:, ahead:] != PADDING)
            if self.weights is not None:
                same = same & (self.weights[:, ahead:] != 0)
            targets[:, : width - ahead] = self.tokens[:, ahead:].where(same, IGNORED)
        return targets

    def target_weights(self, k: int = 0) -> torch.Tensor | None:
        """How much each of `targets(k)` counts, [B, seq_len]; None: all 1."""
        if self.weights is None:
            return None
        return torch.nn.functional.pad(self.weights[:, k + 1 :], (0, k))


@dataclass(frozen=True)
class PackState:
    """The position of a packer. Tuples have one entry per domain: epoch, pieces taken in it, targets so far.

    `rest` is the unfinished piece that the next row starts with; `key` identifies the data and settings.
    """

    key: str
    epochs: tuple[int, ...]
    cursors: tuple[int, ...]
    emitted: tuple[int, ...]
    rest: Span | None = None

    def to_json(self) -> dict[str, Any]:
        """A tree for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> PackState:
        """The state that `to_json` gave; raises `DataError` for anything else."""
        try:
            epochs, cursors, emitted = (tuple(int(n) for n in tree[name]) for name in ("epochs", "cursors", "emitted"))
            rest = tree["rest"]
            span = None if rest is None else (int(rest[0]), int(rest[1]), int(rest[2]))
            return cls(str(tree["key"]), epochs, cursors, emitted, span)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError("the saved position in the data is damaged") from error


class _Pieces:
    """The pieces of one domain's documents, numbered in file order."""

    def __init__(self, offsets: npt.NDArray[np.uint64], seq_len: int) -> None:
        self.offsets = offsets.astype(np.int64)
        self.seq_len = seq_len
        num_targets = np.maximum(np.diff(self.offsets) - 1, 0)
        self.ends = np.cumsum(-(-num_targets // seq_len))  # pieces up to and including each document
        self.num_targets = int(num_targets.sum())
        self.count = int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, number: int) -> tuple[int, int]:
        """First token and end of a piece."""
        document = int(self.ends.searchsorted(number, "right"))
        before = int(self.ends[document - 1]) if document else 0
        start = int(self.offsets[document]) + (number - before) * self.seq_len
        return start, min(start + self.seq_len + 1, int(self.offsets[document + 1]))


class Packer:
    """Training batches of `[batch_size, seq_len + 1]` from the `train` split; immutable except for a cache.

    `weights` maps domains to their shares of the targets. Domains not named divide the rest by size, and 0 leaves
    a domain out. If every domain is named, only the proportions count.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        batch_size: int,
        seq_len: int,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        """Raises `DataError` for unknown domains, impossible shares and too little data for one batch."""
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.domains = shards.domains
        self._tokens = [shards.tokens(domain, "train").view(np.ndarray) for domain in shards.domains]
        self._pieces = [_Pieces(shards.offsets(domain, "train"), seq_len) for domain in shards.domains]
        sizes = {d: pieces.num_targets for d, pieces in zip(self.domains, self._pieces, strict=True)}
        self.weights = resolve_weights(sizes, weights or {})
        self.targets_per_epoch = {domain: sizes[domain] for domain in self.domains if self.weights[domain]}
        available, needed = sum(self.targets_per_epoch.values()), batch_size * seq_len
        if available < needed:
            raise DataError(
                f"{available} training tokens are less than one batch of {batch_size} x {seq_len}: "
                "give more text, or lower train.batch_size or train.seq_len"
            )
        settings = f"{shards.source_fingerprint} {shards.tokenizer_fingerprint} {seq_len} {seed}"
        self.key = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self._shares = [self.weights[domain] for domain in self.domains]
        self._orders: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}  # domain -> epoch and its order

    def start(self) -> PackState:
        """The state before the first batch."""
        zeros = (0,) * len(self.domains)
        return PackState(self.key, zeros, zeros, zeros)

    def next(self, state: PackState) -> tuple[Batch, PackState]:
        """The batch at `state`, and the state after it; raises `DataError` for a state from other data."""
        if state.key != self.key or len(state.emitted) != len(self.domains):
            raise DataError("the data, seq_len or seed differ from those of the saved position; start a new run")
        epochs, cursors, emitted = list(state.epochs), list(state.cursors), list(state.emitted)

        def take() -> Span:
            total = sum(emitted) + 1
            lags = [share * total - count for share, count in zip(self._shares, emitted, strict=True)]
            domain = lags.index(max(lags))
            if cursors[domain] == self._pieces[domain].count:
                epochs[domain], cursors[domain] = epochs[domain] + 1, 0
            order = self._shuffle(domain, epochs[domain])
            start, stop = self._pieces[domain].locate(int(order[cursors[domain]]))
            cursors[domain] += 1
            emitted[domain] += stop - start - 1
            return domain, start, stop

        batch, rest = _fill_rows(take, state.rest, self._tokens, self.batch_size, self.seq_len + 1)
        return batch, PackState(self.key, tuple(epochs), tuple(cursors), tuple(emitted), rest)

    def _shuffle(self, domain: int, epoch: int) -> npt.NDArray[np.int64]:
        cached = self._orders.get(domain)
        if cached is None or cached[0] != epoch:
            key = np.array([self.seed % 2**64, (domain << 32) + epoch], np.uint64)
            raw = np.random.Philox(key=key).random_raw(self._pieces[domain].count)
            cached = self._orders[domain] = (epoch, np.argsort(raw, kind="stable"))
        return cached[1]


def resolve_weights(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """The share of each domain in `sizes` (domain -> train targets); see `Packer`. The sum is 1."""
    unknown = [name for name in weights if name not in sizes]
    if unknown:
        raise DataError(f"data.weights: no domain '{unknown[0]}'; there are: {', '.join(sizes)}")
    empty = [name for name, weight in weights.items() if weight > 0 and sizes[name] == 0]
    if empty:
        raise DataError(f"data.weights: domain '{empty[0]}' has no training text")
    named = sum(weights.values())
    others = sum(size for name, size in sizes.items() if name not in weights)
    if others and named > 1 + 1e-9:
        raise DataError(
            f"data.weights: the shares sum to {named:g}, which leaves none for other domains; "
            "keep the sum within 1, or name every domain"
        )
    rest = max(0.0, 1.0 - named) if others else 0.0
    shares = {name: weights[name] if name in weights else rest * size / max(others, 1) for name, size in sizes.items()}
    total = sum(shares.values())
    if total <= 0:
        raise DataError("data.weights: no domain has a share above 0")
    return {name: share / total for name, share in shares.items()}


def evaluation_batches(
    shards: ShardSet,
    domain: str,
    *,
    split: Split = "valid",
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """The documents of a domain in order, each target exactly once, up to `max_tokens` targets.

    Documents are packed whole, back to back. The last row ends in padding (id 0), and the last batch has
    only as many rows as it needs.
    """
    tokens = shards.tokens(domain, split).view(np.ndarray)
    spans = _iterate_documents(shards.offsets(domain, split), max_tokens)
    rest = next(spans, None)
    while rest is not None:
        batch, rest = _fill_rows(lambda: next(spans, None), rest, [tokens], batch_size, seq_len + 1)
        num_rows = int((batch.segments[:, 0] != PADDING).sum())
        rest = rest or next(spans, None)
        yield Batch(batch.tokens[:num_rows], batch.segments[:num_rows])


def _iterate_documents(offsets: npt.NDArray[np.uint64], max_tokens: int | None) -> Iterator[Span]:
    left = int(offsets[-1]) if max_tokens is None else max_tokens
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        num_targets = min(stop - start - 1, left)
        left -= num_targets
        if num_targets > 0:
            yield 0, start, start + num_targets + 1


def _fill_rows(
    take: Callable[[], Span | None],
    rest: Span | None,
    tokens_by_domain: list[npt.NDArray[Any]],
    num_rows: int,
    width: int,
) -> tuple[Batch, Span | None]:
    """Fill rows from `rest`, then from `take` until it gives None; returns the batch and the rest that did not fit."""
    tokens = np.zeros((num_rows, width), np.int64)
    segments = np.full((num_rows, width), PADDING, np.int64)
    for row in range(num_rows):
        position = segment = 0
        while position < width:
            span = rest or take()
            if span is None:
                return Batch(torch.from_numpy(tokens), torch.from_numpy(segments)), None
            domain, start, stop = span
            size = min(width - position, stop - start)
            tokens[row, position : position + size] = tokens_by_domain[domain][start : start + size]
            segments[row, position : position + size] = segment
            position, segment = position + size, segment + 1
            rest = (domain, start + size - 1, stop) if start + size < stop else None
    return Batch(torch.from_numpy(tokens), torch.from_numpy(segments)), rest
