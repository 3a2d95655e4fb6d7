"""Documents to memory-mapped token shards: tokenised once, read anywhere for the price of a page fault.

A shard directory holds, for domain number `d` and split `s` (`train`, `valid`):

    d.s.tokens    documents one after another, each what begins a prompt (BOS), text, EOS; little-endian uint16, or
                  uint32 if the vocabulary exceeds 65536
    d.s.offsets   little-endian uint64 [documents + 1]: where each document starts, and the end of the last
    index.json    format, dtype, fingerprints; tokens, documents and bytes of text by domain and split

A directory is written next to its final place under another name, with the index last, then synced and renamed.
Files that do not match the index are refused. The hash of a document's text decides its split. So the split is
stable when the corpus is reordered or grows, and equal texts are on the same side even in different domains. If
a domain would lack a side, the document nearest to the border moves over. Memory: one batch of documents, and 24
bytes per document.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moestro.data.documents import Document
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
FORMAT = 1
MAX_DOMAINS = 256
_BATCH_CHARS = 1 << 20  # about 40 MB while the tokenizer works on it
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class SplitSize:
    """Size of one split of one domain; `bytes` counts the text without special tokens."""

    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class ShardSet:
    """An open shard directory; arrays are mapped when asked for."""

    directory: Path
    domains: tuple[str, ...]
    counts: dict[tuple[str, Split], SplitSize]
    dtype: np.dtype[Any]
    vocab_size: int
    tokenizer_fingerprint: str
    source_fingerprint: str

    def tokens(self, domain: str, split: Split) -> npt.NDArray[Any]:
        """All ids of a split, [tokens], read-only."""
        return _map(self._path(domain, split, "tokens"), self.dtype, self.counts[domain, split].tokens)

    def offsets(self, domain: str, split: Split) -> npt.NDArray[np.uint64]:
        """Where documents start, [documents + 1], read-only."""
        return _map(self._path(domain, split, "offsets"), np.dtype("<u8"), self.counts[domain, split].documents + 1)

    def num_tokens(self, domain: str, split: Split) -> int:
        """Tokens of a split, including BOS and EOS of each document."""
        return self.counts[domain, split].tokens

    def _path(self, domain: str, split: Split, kind: str) -> Path:
        if domain not in self.domains:
            raise DataError(f"no domain '{domain}' in {self.directory}; there are: {', '.join(self.domains)}")
        return self.directory / _name_file(self.domains.index(domain), split, kind)


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: str | Path,
    valid_fraction: float,
    log: Callable[[str], None] | None = None,
) -> ShardSet:
    """Tokenise `documents` into `directory`, replacing any shards there, and open them.

    Raises `DataError` if there are no documents, the disk is full, the place cannot be written, or the directory
    holds something else. Whatever goes wrong, `directory` itself is never half-written.
    """
    directory = Path(directory).absolute()
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        if directory.exists() and not (directory / "index.json").exists() and any(directory.iterdir()):
            raise DataError(f"{directory} exists and holds no shards: choose another place for them")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(documents, tokenizer, temporary, valid_fraction, log or (lambda line: None))
        _replace(temporary, directory)
    except OSError as error:
        raise DataError(f"cannot write shards to {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_shards(directory)


def open_shards(directory: str | Path) -> ShardSet:
    """Open a shard directory; raises `DataError` if it is missing, of another format, or damaged."""
    directory = Path(directory)
    try:
        tree = json.loads((directory / "index.json").read_text("utf-8"))
        if tree["format"] != FORMAT:
            raise DataError(f"{directory} holds shards of format {tree['format']}; this is format {FORMAT}")
        counts = {(entry["name"], split): SplitSize(**entry[split]) for entry in tree["domains"] for split in SPLITS}
        shards = ShardSet(
            directory,
            tuple(entry["name"] for entry in tree["domains"]),
            counts,
            np.dtype({"uint16": "<u2", "uint32": "<u4"}[tree["dtype"]]),
            tree["vocab_size"],
            tree["tokenizer"],
            tree["source"],
        )
        for domain, split in counts:
            _check(shards, domain, split)
    except OSError as error:
        raise DataError(f"no shards in {directory}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory}/index.json is damaged; prepare the data again") from error
    return shards


def _check(shards: ShardSet, domain: str, split: Split) -> None:
    number, count = shards.domains.index(domain), shards.counts[domain, split]
    expected = {"tokens": count.tokens * shards.dtype.itemsize, "offsets": (count.documents + 1) * 8}
    for kind, size in expected.items():
        path = shards.directory / _name_file(number, split, kind)
        found = path.stat().st_size
        if found != size:
            raise DataError(f"{path} is damaged ({found} bytes, not {size}); prepare the data again")
    offsets = shards.offsets(domain, split)
    if offsets[0] != 0 or offsets[-1] != count.tokens:
        raise DataError(f"{shards.directory}: offsets of '{domain}' are damaged; prepare the data again")


def _name_file(number: int, split: Split, kind: str) -> str:
    return f"{number}.{split}.{kind}"


def _map(path: Path, dtype: np.dtype[Any], size: int) -> npt.NDArray[Any]:
    if size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    try:
        return np.memmap(path, dtype, "r", shape=(size,))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot map {path}: {error}") from error


@dataclass
class _Side:
    """One split of one domain while it is written; the arrays have one entry per document, in file order."""

    path: Path
    digests: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    bytes: array[int] = field(default_factory=lambda: array("Q"))
    pending: list[npt.NDArray[Any]] = field(default_factory=list)

    def add(self, tokens: npt.NDArray[Any], digest: int, num_bytes: int) -> None:
        self.digests.append(digest)
        self.lengths.append(len(tokens))
        self.bytes.append(num_bytes)
        self.pending.append(tokens)
        if len(self.pending) >= _BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        if self.pending or not self.path.exists():
            with self.path.open("ab") as stream:
                stream.write(b"".join(tokens.tobytes() for tokens in self.pending))
            self.pending = []

    def offsets(self) -> npt.NDArray[np.uint64]:
        return np.concatenate([[0], np.cumsum(np.array(self.lengths, "<u8"), dtype="<u8")]).astype("<u8")


_Sides = dict[Split, _Side]


def _write(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: Path,
    valid_fraction: float,
    log: Callable[[str], None],
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    domains: dict[str, _Sides] = {}
    source = hashlib.sha256(repr(valid_fraction).encode())
    border = int(valid_fraction * 2**64)
    num_documents = num_tokens = 0
    for batch in _group(documents):
        encoded = tokenizer.encode_documents([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            text = document.text.encode()
            hashed = hashlib.sha256(text).digest()
            source.update(hashlib.sha256(document.domain.encode()).digest() + hashed)
            digest = int.from_bytes(hashed[:8], "little")
            tokens = np.array(ids, dtype)
            sides = _find_sides(domains, document.domain, directory)
            sides["valid" if digest < border else "train"].add(tokens, digest, len(text))
            num_tokens += len(tokens)
        for sides in domains.values():
            _flush(sides)
        num_documents += len(batch)
        log(f"{num_documents:,} documents, {num_tokens:,} tokens")
    if not domains:
        raise DataError("there are no documents to prepare")
    moves = _choose_moves(list(domains.values()), border)
    for sides in domains.values():
        _move(sides, moves, dtype)
        _write_offsets(sides)
    index = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "source": source.hexdigest(),
        "valid_fraction": valid_fraction,
        "domains": [
            {"name": name} | {split: _count(sides[split]) for split in SPLITS} for name, sides in domains.items()
        ],
    }
    for path in directory.iterdir():
        _sync(path)
    (directory / "index.json").write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n", "utf-8")
    _sync(directory / "index.json")
    _sync(directory)


def _group(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _find_sides(domains: dict[str, _Sides], name: str, directory: Path) -> _Sides:
    if name not in domains:
        if len(domains) == MAX_DOMAINS:
            raise DataError(f"more than {MAX_DOMAINS} domains; is the 'domain' field (or folder layout) meant so?")
        number = len(domains)
        domains[name] = {split: _Side(directory / _name_file(number, split, "tokens")) for split in SPLITS}
    return domains[name]


def _flush(sides: _Sides) -> None:
    for side in sides.values():
        side.flush()


def _count(side: _Side) -> dict[str, int]:
    return {"tokens": sum(side.lengths), "documents": len(side.lengths), "bytes": sum(side.bytes)}


def _write_offsets(sides: _Sides) -> None:
    for side in sides.values():
        side.path.with_suffix(".offsets").write_bytes(side.offsets().tobytes())


def _choose_moves(domains: list[_Sides], border: int) -> npt.NDArray[np.uint64]:
    """Digests that change sides, so that each domain can train on something and, if possible, validate.

    A text moves in every domain at once, and at most once. So this repeats until nothing changes.
    """
    unique = [np.unique(np.concatenate([sides[split].digests for split in SPLITS])) for sides in domains]
    moves: set[int] = set()
    changed = True
    while changed:
        changed = False
        for digests in unique:
            moved = np.isin(digests, np.array(sorted(moves), np.uint64))
            is_valid = (digests < border) ^ moved
            if is_valid.all():
                candidates = digests[~moved][-1:]
            elif not is_valid.any() and len(digests) > 1:
                candidates = digests[~moved][:1]
            else:
                continue
            moves.update(int(digest) for digest in candidates)
            changed = changed or len(candidates) > 0
    return np.array(sorted(moves), np.uint64)


def _move(sides: _Sides, moves: npt.NDArray[np.uint64], dtype: np.dtype[Any]) -> None:
    """Rewrite both sides of a domain if it has documents with a digest in `moves`: these change sides."""
    moving = {split: np.isin(np.array(sides[split].digests), moves) for split in SPLITS}
    if not any(flags.any() for flags in moving.values()):
        return
    rewritten: _Sides = {}
    for split, other in (SPLITS, SPLITS[::-1]):
        rewritten[split] = _Side(sides[split].path.with_suffix(".moved"))
        _copy(sides[split], ~moving[split], rewritten[split], dtype)
        _copy(sides[other], moving[other], rewritten[split], dtype)
        rewritten[split].flush()
    for split in SPLITS:
        path = sides[split].path
        sides[split] = rewritten[split]
        sides[split].path = rewritten[split].path.replace(path)


def _copy(source: _Side, wanted: npt.NDArray[np.bool_], target: _Side, dtype: np.dtype[Any]) -> None:
    offsets = source.offsets()
    tokens = _map(source.path, dtype, int(offsets[-1]))
    for i in np.flatnonzero(wanted).tolist():
        target.add(tokens[offsets[i] : offsets[i + 1]], source.digests[i], source.bytes[i])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)
    temporary.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
