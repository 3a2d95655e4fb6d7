"""Files to documents: one stream of `(text, domain)` from any source of text.

A source is `builtin`, a file or folder, or the name of a Hugging Face dataset (`owner/name` or `owner/name:config`).
Which files of a folder are read is in `files.py`, what a record's text is in `records.py`, how a file's encoding is
found in `encodings.py`. Files come in sorted order, so the same source always gives the same stream.

A document's domain is the first sub-folder below the source; else the record's `domain` field; else the stem
of a file given by itself, or `text` for files at the top of a folder.

Reading is strict: a bad record, a damaged archive or bytes that no encoding explains are a `DataError` with file and
line, since text that is silently repaired or dropped shifts every number measured later. What is left out or guessed is
counted, and `notices` tells it. Memory is bounded by one line or batch (only `.json` is read whole). Documents of text
files are cut near 32 KiB, so that even one big file gives a validation split. The price: neighbouring parts of one book
may be on both sides of the split.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from moestro import machine
from moestro.data.columns import load_pyarrow, read_arrow, read_parquet
from moestro.data.documents import Document, decode, iterate_lines, split_text
from moestro.data.encodings import Utf8Stream, find_encoding
from moestro.data.files import PLAIN, SUFFIXES, Found, SourceFile, advise, find_files, kind_of, single_file
from moestro.data.records import read_text
from moestro.errors import DataError
from moestro.terminal import printable

MAX_JSON_BYTES = 1 << 30  # a .json file is read whole, and takes several times its size
MAX_DOMAIN_CHARS = 80
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def iterate_documents(source: str, *, encoding: str = "", text_field: str = "") -> Iterator[Document]:
    """Stream the documents of `source`; raises `DataError` if it cannot be read or has no text.

    `encoding` is that of files that are not UTF-8; empty: guessed. `text_field` names the text of a record.
    """
    return Corpus(source, encoding=encoding, text_field=text_field).documents()


class Corpus:
    """A source of text, and what was noticed while it was read.

    `found` lists its files (None: it has none); `left_out` and `guessed` count files and records.
    """

    def __init__(self, source: str, *, encoding: str = "", text_field: str = "") -> None:
        """Raises `DataError` for a source that is nothing Moestro reads."""
        self.source, self.encoding, self.text_field = source, encoding, text_field
        self.found = _open_source(source)
        self.noticed: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def documents(self) -> Iterator[Document]:
        """Every document, in order; raises `DataError` at the first thing that cannot be read, or if there is none."""
        found = False
        for document in self._documents():
            found = True
            yield document
        if not found:
            raise DataError(f"no text in '{self.source}'")

    def notices(self) -> list[str]:
        """One line for each kind of thing that was guessed, turned into text or left out of what was read so far."""
        return [f"{kind}: {count:,}, such as {self.examples[kind]}" for kind, count in self.noticed.items()]

    def read(self, file: SourceFile) -> Iterator[Document]:
        """The documents of one file; a record's own domain yields to its folder's."""
        try:
            if file.kind == ".json" and file.path.stat().st_size > MAX_JSON_BYTES:
                raise DataError(f"{file.path}: too large for .json, which is read whole; make it .jsonl")
            encoding = self._find_encoding(file)
            if encoding:
                with _open_binary(file.path) as stream:
                    yield from self._read_stream(_as_utf8(stream, encoding, file.path), file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file.path}: damaged archive: {error}") from error
        except OSError as error:
            raise DataError(f"cannot read {file.path}: {error.strerror or error}") from error

    def _documents(self) -> Iterator[Document]:
        if self.source == "builtin":
            from moestro.data.builtin_corpus import iterate_builtin

            yield from iterate_builtin()
        elif self.found is None:
            yield from self._read_dataset()
        else:
            for path, reason in self.found.problems:
                raise DataError(f"{path}: {reason}")
            for file in self.found.files:
                yield from self.read(file)

    def _find_encoding(self, file: SourceFile) -> str:
        """ "" for a binary file, which is left out; tables say themselves how their strings are written."""
        if file.kind in (".parquet", ".arrow"):
            return "utf-8"
        try:
            encoding = find_encoding(lambda: _open_binary(file.path), self.encoding)
        except (OSError, EOFError, zlib.error):
            return "utf-8"  # reading it again says where it is damaged
        if not encoding:
            self._notice("binary files left out", file.path)
        elif encoding != self.encoding and not encoding.startswith("utf"):
            self._notice(f"files that are not UTF-8, read as {encoding}", file.path)
        return encoding

    def _notice(self, kind: str, example: object) -> None:
        self.noticed[kind] += 1
        self.examples.setdefault(kind, printable(str(example), MAX_DOMAIN_CHARS))

    def _read_stream(self, stream: IO[bytes], file: SourceFile) -> Iterator[Document]:
        if file.kind in PLAIN:
            domain = _clean_domain(file.folder_domain or file.default_domain)
            texts = split_text(stream, file.path, separated=file.kind == ".txt")
            yield from (Document(text, domain) for text in texts if text.strip())
            return
        for place, record in _read_records(stream, file, self.text_field):
            yield from self._parse_record(record, place, file)

    def _parse_record(self, record: Any, place: str, file: SourceFile) -> Iterator[Document]:
        domain = record.get("domain") if isinstance(record, dict) else None
        text, is_conversation = read_text(record, place, self.text_field)
        if not isinstance(domain, str | None):
            raise DataError(f"{place}: 'domain' is not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise DataError(f"{place}: the text has a lone surrogate, which is not valid UTF-8") from error
        if is_conversation:
            self._notice("conversations read as plain text (User: … Assistant: …)", place)
        if text.strip():
            yield Document(text, _clean_domain(file.folder_domain or domain or file.default_domain))
        else:
            self._notice("records without text left out", place)

    def _read_dataset(self) -> Iterator[Document]:
        """Stream the `train` split of a Hugging Face dataset."""
        name, _, config = self.source.partition(":")
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError(
                f"no file or folder '{self.source}'; to stream it from Hugging Face: {machine.how_to_install('data')}"
            ) from error
        place = SourceFile(Path(self.source), "", None, name.split("/")[1])
        for number, record in enumerate(_iterate_rows(datasets, name, config or None, self.source), 1):
            yield from self._parse_record(record, f"{self.source}, row {number}", place)


def fingerprint_files(source: str) -> str | None:
    """A hash of the names, sizes and dates of the files behind a source, without reading them; None without files."""
    root = _expand(source)
    if source == "builtin" or not root.exists():
        return None
    files = [file.path for file in find_files(root).files] if root.is_dir() else [root]
    facts = [(str(path), status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _open_source(source: str) -> Found | None:
    """The files of a source; None for the built-in corpus and for data sets of the hub."""
    if not source:
        raise DataError("the data source is empty: name a file, a folder, a dataset or 'builtin'")
    if source == "builtin":
        return None
    path = _expand(source)
    if path.is_dir():
        found = find_files(path)
        if not found.files and not found.problems:
            raise DataError(f"no {' '.join(SUFFIXES)} files (plain, .gz or .zst) below {path}{_list_others(found)}")
        return found
    kind = kind_of(path)
    if path.exists():
        if kind is None:
            raise DataError(f"cannot read {path}: {advise(path.suffix.lower())}")
        return Found([single_file(path, kind)])
    if kind is not None or not _DATASET_NAME.fullmatch(source):
        raise DataError(f"no such file or folder: {source}")
    return None


def _expand(source: str) -> Path:
    """`~` and `~user` as a shell reads them, unless something here has that very name."""
    path = Path(source)
    if path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user
        return path


def _list_others(found: Found) -> str:
    """What else a folder without text holds, and what to do with it."""
    others = found.skipped.most_common(4)
    if not others:
        return ", which is empty"
    advice = {advise(suffix) for suffix, _ in others if advise(suffix) != advise("")}
    return f": there are {', '.join(f'{count} {reason}' for reason, count in others)}" + "".join(
        f"; {text}" for text in sorted(advice)
    )


def _clean_domain(name: str) -> str:
    """A name that can be printed, stored and compared: folders may be named with bytes that are no text."""
    clean = printable(name)
    if len(clean) <= MAX_DOMAIN_CHARS:
        return clean
    return f"{clean[: MAX_DOMAIN_CHARS - 9]}-{hashlib.sha256(clean.encode()).hexdigest()[:8]}"


@contextmanager
def _open_binary(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as stream:
            yield cast(IO[bytes], stream)
    elif path.suffix.lower() == ".zst":
        pyarrow = load_pyarrow(path)  # unlike zstandard's reader, its stream refuses a frame that ends early
        with pyarrow.CompressedInputStream(str(path), "zstd") as stream:
            yield cast(IO[bytes], stream)
    else:
        with path.open("rb") as stream:
            yield stream


def _as_utf8(stream: IO[bytes], encoding: str, path: Path) -> IO[bytes]:
    return stream if encoding == "utf-8" else cast(IO[bytes], Utf8Stream(stream, encoding, str(path)))


def _read_records(stream: IO[bytes], file: SourceFile, text_field: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record of a file."""
    match file.kind:
        case ".json":
            return _read_json(stream, file.path)
        case ".csv" | ".tsv":
            return _read_csv(stream, file.path, "," if file.kind == ".csv" else "\t")
        case ".parquet":
            return read_parquet(stream, file.path, text_field)
        case ".arrow":
            return read_arrow(stream, file.path, text_field)
    return _read_jsonl(stream, file.path)


def _read_json(stream: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or, as some name it, one record a line."""
    lines = b"".join(chunk for _, chunk in iterate_lines(stream, path)).splitlines(keepends=True)
    if len(lines) > 1 and _is_record(lines[0], path):
        for number, line in enumerate(lines, 1):
            yield from _parse_line(line, f"{path}, line {number}")
        return
    value = _parse_json(b"".join(lines), str(path))
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{path}, record {number}", record


def _is_record(line: bytes, path: Path) -> bool:
    """Whether a line alone is a JSON object or string."""
    try:
        return isinstance(_parse_json(line, str(path)), dict | str)
    except DataError:
        return False


def _read_jsonl(stream: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _join_lines(stream, path):
        yield from _parse_line(line, f"{path}, line {number}")


def _join_lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line, whole."""
    parts: list[bytes] = []
    number = 0
    for number, chunk in iterate_lines(stream, path):
        parts.append(chunk)
        if chunk.endswith(b"\n"):
            yield number, b"".join(parts)
            parts = []
    if parts:
        yield number, b"".join(parts)


def _parse_line(line: bytes, place: str) -> Iterator[tuple[str, Any]]:
    if line.strip():
        yield place, _parse_json(line, place)


def _parse_json(data: bytes, place: str) -> Any:
    text = decode(codecs.getincrementaldecoder("utf-8-sig")(), data, place, final=True)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error


def _read_csv(stream: IO[bytes], path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows as records; the first line names the columns."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = (decode(decoder, line, f"{path}, line {number}") for number, line in _join_lines(stream, path))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for record in reader:
            yield f"{path}, line {reader.line_num}", record
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error


def _iterate_rows(datasets: Any, name: str, config: str | None, source: str) -> Iterator[Any]:
    try:
        yield from datasets.load_dataset(name, config, split="train", streaming=True)
    except Exception as error:  # the hub, HTTP and builder layers each raise their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot stream dataset '{source}' (offline, or no such dataset or config?): {reason}"
        ) from error
