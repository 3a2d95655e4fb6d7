"""Documents, and how the lines of a text file become documents of bounded size."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moestro.errors import DataError

SEPARATOR = "<|endoftext|>"  # alone on a line of a .txt file, it separates two documents
CUT_BYTES = 32 * 1024
_CHUNK_BYTES = 16 * 1024  # a line longer than this arrives in several strings


@dataclass(frozen=True, slots=True)
class Document:
    """One text that is packed, split and counted as a whole."""

    text: str
    domain: str


def iterate_lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Pairs `(line number, bytes)` of at most `_CHUNK_BYTES`; a longer line comes as several pairs."""
    number, buffer = 1, b""
    try:
        while block := stream.read(_CHUNK_BYTES):
            *lines, buffer = (buffer + block).split(b"\n")
            for line in lines:
                yield number, line + b"\n"
                number += 1
            if len(buffer) >= _CHUNK_BYTES:
                yield number, buffer
                buffer = b""
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}, line {number}: damaged archive: {error}") from error
    except OSError as error:
        raise DataError(f"{path}, line {number}: cannot read on: {error.strerror or error}") from error
    if buffer:
        yield number, buffer


def decode(decoder: codecs.IncrementalDecoder, data: bytes, place: str, final: bool = False) -> str:
    """Decode bytes as UTF-8; a `DataError` names the place if they are not valid."""
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not valid UTF-8 ({error.reason}); convert the file first") from error


def split_text(stream: IO[bytes], path: Path, *, separated: bool) -> Iterator[str]:
    """Documents of a text file: split at separator lines if `separated`, each cut near `CUT_BYTES`."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    cutter, number, at_line_start = _Cutter(), 1, True
    for number, line in iterate_lines(stream, path):
        text = decode(decoder, line, f"{path}, line {number}")
        if separated and at_line_start and text.rstrip("\r\n") == SEPARATOR:
            yield from cutter.finish()
        else:
            yield from cutter.add(text)
        at_line_start = line.endswith(b"\n")
    decode(decoder, b"", f"{path}, line {number}", final=True)
    yield from cutter.finish()


def cut_long_document(text: str) -> list[str]:
    """Cut `text` into parts of at most `CUT_BYTES`: at blank lines, else at lines, else anywhere."""
    cutter = _Cutter()
    parts = [part for line in text.splitlines(keepends=True) for part in cutter.add(line)]
    return [*parts, *cutter.finish()]


class _Cutter:
    """Collects lines of one document and yields parts as soon as they are full."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.size = 0
        self.paragraph_end = 0  # lines up to and including the last blank one, once the part is half full

    def add(self, line: str) -> Iterator[str]:
        """Take one line; yields the parts that it completes."""
        for piece in _cut_hard(line):
            size = len(piece.encode())
            if self.size + size > CUT_BYTES:
                yield self._take(self.paragraph_end or len(self.lines))
            if self.size + size > CUT_BYTES:  # the open paragraph alone is too long for this line
                yield self._take(len(self.lines))
            self.lines.append(piece)
            self.size += size
            if self.size >= CUT_BYTES // 2 and not piece.strip():
                self.paragraph_end = len(self.lines)

    def finish(self) -> Iterator[str]:
        """Yield what is left, and start the next document."""
        if self.lines:
            yield self._take(len(self.lines))

    def _take(self, count: int) -> str:
        part = "".join(self.lines[:count])
        self.lines = self.lines[count:]
        self.size -= len(part.encode())
        self.paragraph_end = 0
        return part


def _cut_hard(line: str) -> Iterator[str]:
    step = CUT_BYTES // 4  # a character takes at most four bytes
    if len(line) <= step:
        yield line
    else:
        yield from (line[start : start + step] for start in range(0, len(line), step))
