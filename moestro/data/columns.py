"""Rows of Parquet and Arrow files as records, a batch at a time; bad UTF-8 is named by its row."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

from moestro import machine
from moestro.data.files import COMPRESSED
from moestro.data.records import FIELDS
from moestro.errors import DataError

_BATCH_ROWS = 256
_ARROW_FILE = b"ARROW1"


def load_pyarrow(path: Path) -> ModuleType:
    """Load pyarrow to read a file; DataError if it is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(f"reading {path} needs pyarrow: {machine.how_to_install('data')}") from error
    return cast(ModuleType, pyarrow)


def read_parquet(stream: IO[bytes], path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of every row."""
    pyarrow = load_pyarrow(path)
    with _named_errors(pyarrow, path, "Parquet"), _seekable(stream, path) as source:
        file = pyarrow.parquet.ParquetFile(source)
        columns = _wanted(file.schema_arrow.names, text_field)
        yield from _read_batches(file.iter_batches(batch_size=_BATCH_ROWS, columns=columns), path)


def read_arrow(stream: IO[bytes], path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of every row of an Arrow stream, as `datasets` saves them, or of an Arrow file."""
    pyarrow = load_pyarrow(path)
    with _named_errors(pyarrow, path, "Arrow"), _seekable(stream, path) as source:
        magic = source.read(len(_ARROW_FILE))
        source.seek(0)
        if magic == _ARROW_FILE:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = batches = pyarrow.ipc.open_stream(source)
        columns = _wanted(reader.schema.names, text_field)
        parts = (batch.slice(start, _BATCH_ROWS) for batch in batches for start in range(0, len(batch), _BATCH_ROWS))
        yield from _read_batches((part.select(columns) for part in parts), path)


@contextmanager
def _seekable(stream: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """The stream, or a copy of what a compressed file holds: tables are not read from their start alone."""
    if path.suffix.lower() not in COMPRESSED:
        yield stream
        return
    with tempfile.TemporaryFile() as spool:
        shutil.copyfileobj(stream, spool)
        spool.seek(0)
        yield spool


@contextmanager
def _named_errors(pyarrow: Any, path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as {kind}: {str(error).splitlines()[0]}") from error


def _wanted(names: list[str], text_field: str) -> list[str]:
    """The columns that records are made of; all, if none has a known name, so that a message can name them."""
    return [name for name in names if name in (text_field, *FIELDS)] or names


def _read_batches(batches: Iterator[Any], path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:
            records = [_row(batch, row, f"{path}, row {number + row + 1}") for row in range(len(batch))]
        for record in records:
            number += 1
            yield f"{path}, row {number}", record


def _row(batch: Any, row: int, place: str) -> dict[str, Any]:
    try:
        (record,) = batch.slice(row, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not valid UTF-8 ({error.reason})") from error
    return cast(dict[str, Any], record)
