"""Files to documents: one stream of `(text, domain)` from any source of text.

A source is `builtin`, a file or folder (`.txt .md .py .json .jsonl .parquet`, each also `.gz` or `.zst`), or
the name of a Hugging Face dataset (`owner/name` or `owner/name:config`). Files come in sorted order; hidden
ones and folders already seen (symbolic links) are skipped, so the same source always gives the same stream.

A document's domain is the first sub-folder below the source; else the record's `domain` field; else the stem
of a file given by itself, or `text` for files at the top of a folder.

Reading is strict: invalid UTF-8, a bad record or a damaged archive is a `DataError` with file and line, since
text that is silently repaired or dropped shifts every number measured later. Memory is bounded by one line
or batch (only `.json` is read whole). Documents of text files are cut near 32 KiB, so that even one big file
gives a validation split. The price: neighbouring parts of one book may be on both sides of the split.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

from moestro import machine
from moestro.data.documents import Document, decode, iterate_lines, split_text
from moestro.errors import DataError

SUFFIXES = (".txt", ".md", ".py", ".json", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst")
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def iterate_documents(source: str) -> Iterator[Document]:
    """Stream the documents of `source`; raises `DataError` if it cannot be read or has no text."""
    found = False
    for document in _open_source(source):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise DataError(f"no text in '{source}'")


def _open_source(source: str) -> Iterator[Document]:
    if not source:
        raise DataError("the data source is empty: name a file, a folder, a dataset or 'builtin'")
    if source == "builtin":
        from moestro.data.builtin_corpus import iterate_builtin

        return iterate_builtin()
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        if _kind(path) is None:
            raise DataError(f"cannot read {path}: known are {' '.join(SUFFIXES)}, each also .gz or .zst")
        return _read_file(path, None, path.name.lstrip(".").split(".")[0])
    if _kind(path) is not None or not _DATASET_NAME.fullmatch(source):
        raise DataError(f"no such file or folder: {source}")
    return _read_dataset(source)


def fingerprint_files(source: str) -> str | None:
    """A hash of the names, sizes and dates of the files behind a source, without reading them; None without files."""
    root = Path(source).expanduser()
    if source == "builtin" or not root.exists():
        return None
    files = list(_walk(root, set())) if root.is_dir() else [root]
    facts = [(str(path), status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _kind(path: Path) -> str | None:
    """The suffix that decides how `path` is read, ignoring compression; None for files that are not text."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in _COMPRESSED else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def _read_folder(root: Path) -> Iterator[Document]:
    files = list(_walk(root, set()))
    if not files:
        raise DataError(f"no {' '.join(SUFFIXES)} files (plain, .gz or .zst) below {root}")
    for path in files:
        parts = path.relative_to(root).parts
        yield from _read_file(path, parts[0] if len(parts) > 1 else None, "text")


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    seen.add(folder.resolve())
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.resolve() not in seen:
                yield from _walk(entry, seen)
        elif entry.is_file() and _kind(entry) is not None:
            yield entry


def _read_file(path: Path, folder_domain: str | None, default_domain: str) -> Iterator[Document]:
    """The documents of one file; a record's own domain yields to `folder_domain` but overrides `default_domain`."""
    kind = _kind(path)
    try:
        with _open_binary(path) as stream:
            if kind in (".txt", ".md", ".py"):
                domain = folder_domain or default_domain
                texts = split_text(stream, path, separated=kind == ".txt")
                yield from (Document(text, domain) for text in texts)
                return
            readers = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
            for place, record in readers[cast(str, kind)](stream, path):
                yield _parse_record(record, place, folder_domain, default_domain)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged archive: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _open_binary(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as stream:
            yield cast(IO[bytes], stream)
    elif path.suffix.lower() == ".zst":
        pyarrow = _load_pyarrow(path)  # unlike zstandard's reader, its stream refuses a frame that ends early
        with pyarrow.CompressedInputStream(str(path), "zstd") as stream:
            yield cast(IO[bytes], stream)
    else:
        with path.open("rb") as stream:
            yield stream


def _load_pyarrow(path: Path) -> ModuleType:
    """Load pyarrow to read a file; DataError if it is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(f"reading {path} needs pyarrow: {machine.how_to_install('data')}") from error
    return cast(ModuleType, pyarrow)


def _read_json(stream: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    value = _parse_json(stream.read(), str(path))
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{path}, record {number}", record


def _read_jsonl(stream: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    parts: list[bytes] = []
    for number, chunk in iterate_lines(stream, path):
        parts.append(chunk)
        if chunk.endswith(b"\n"):
            yield from _parse_line(parts, f"{path}, line {number}")
            parts = []
    if parts:
        yield from _parse_line(parts, f"{path}, line {number}")


def _parse_line(parts: Iterable[bytes], place: str) -> Iterator[tuple[str, Any]]:
    line = b"".join(parts)
    if line.strip():
        yield place, _parse_json(line, place)


def _parse_json(data: bytes, place: str) -> Any:
    text = decode(codecs.getincrementaldecoder("utf-8-sig")(), data, place, final=True)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error


def _read_parquet(stream: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow = _load_pyarrow(path)
    try:
        with tempfile.TemporaryFile() as spool:
            if path.suffix.lower() in _COMPRESSED:  # Parquet is read from its end
                shutil.copyfileobj(stream, spool)
            file = pyarrow.parquet.ParquetFile(spool if path.suffix.lower() in _COMPRESSED else stream)
            columns = [name for name in ("text", "content", "domain") if name in file.schema_arrow.names]
            batches = file.iter_batches(batch_size=256, columns=columns)
            records = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, record in enumerate(records, start=1):
                yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from error


def _parse_record(record: Any, place: str, folder_domain: str | None, default_domain: str) -> Document:
    domain: Any = None
    if isinstance(record, dict):
        domain = record.get("domain")
        record = record.get("text", record.get("content"))
    if not isinstance(record, str):
        raise DataError(f"{place}: expected a 'text' (or 'content') that is a string")
    if domain is not None and not isinstance(domain, str):
        raise DataError(f"{place}: 'domain' is not a string")
    try:
        record.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"{place}: the text has a lone surrogate, which is not valid UTF-8") from error
    return Document(record, folder_domain or domain or default_domain)


def _read_dataset(source: str) -> Iterator[Document]:
    """Stream the `train` split of a Hugging Face dataset."""
    name, _, config = source.partition(":")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"no file or folder '{source}'; to stream it from Hugging Face: {machine.how_to_install('data')}"
        ) from error
    records = _iterate_rows(datasets, name, config or None, source)
    for number, record in enumerate(records, 1):
        yield _parse_record(record, f"{source}, row {number}", None, name.split("/")[1])


def _iterate_rows(datasets: Any, name: str, config: str | None, source: str) -> Iterator[Any]:
    try:
        yield from datasets.load_dataset(name, config, split="train", streaming=True)
    except Exception as error:  # the hub, HTTP and builder layers each raise their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot stream dataset '{source}' (offline, or no such dataset or config?): {reason}"
        ) from error
