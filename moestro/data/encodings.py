"""The character encoding of a file: UTF-8, what its byte order mark says, or a guess.

A guess is charset-normalizer's, among encodings that were in wide use. It is made from some 200 KiB around the first
byte that is not UTF-8, and taken only if the whole file can be decoded with it. What is UTF-8 but for a few bytes is
damaged, not in another encoding, and stays UTF-8: the reader will say where.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO

from moestro.errors import DataError

_BLOCK = 1 << 18
_HEAD = 8192  # a zero byte among these marks a binary file
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
          codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
# Where two explain a text equally well, the first is taken.
CANDIDATES = (
    *("cp1252", "cp949", "gb18030", "cp932", "big5", "euc_jp", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254"),
    *("cp1255", "cp1256", "cp1257", "cp1258", "cp874"),
)


def find_encoding(open_file: Callable[[], AbstractContextManager[IO[bytes]]], named: str) -> str:
    """The encoding of a file, "" if it is binary. `named` is that of files that are not UTF-8; empty: guess."""
    with open_file() as file:
        sample = _find_damage(file)
    if sample is None:
        return "utf-8"
    for mark, encoding in _MARKS.items():
        if sample.startswith(mark):
            return encoding
    if _is_damaged_utf8(sample):
        return "utf-8"
    if named:
        return named
    if b"\0" in sample[:_HEAD]:
        return ""
    guesses = guess_encodings(sample)
    with open_file() as file:
        return _first_that_decodes(_blocks(file), guesses) or "utf-8"


def guess_encodings(sample: bytes) -> list[str]:
    """The `CANDIDATES` that may explain `sample`, the likeliest first."""
    from charset_normalizer import from_bytes

    ranked = []
    for match in from_bytes(sample, cp_isolation=list(CANDIDATES)):
        places = [CANDIDATES.index(name) for name in match.could_be_from_charset if name in CANDIDATES]
        ranked.append((match.chaos, -match.coherence, min(places, default=len(CANDIDATES))))
    return [CANDIDATES[place] for *_, place in sorted(ranked) if place < len(CANDIDATES)]


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _find_damage(file: IO[bytes]) -> bytes | None:
    """Bytes around the first ones that are not UTF-8, whole lines where there are any; None if all is UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    kept = b""
    for block in _blocks(file):
        if not kept and b"\0" in block[:_HEAD]:
            return block
        if not _decodes(decoder, block, final=False):
            return _whole_lines(kept + block + file.read(_BLOCK)) if kept else block + file.read(_BLOCK)
        kept = block
    return None if _decodes(decoder, b"", final=True) else kept


def _whole_lines(sample: bytes) -> bytes:
    first, last = sample.find(b"\n"), sample.rfind(b"\n")
    return sample[first + 1 : last + 1] if 0 <= first < last else sample


def _is_damaged_utf8(sample: bytes) -> bool:
    """Whether more characters of several bytes are UTF-8 than not, or only the end of the last one is missing."""
    text = sample.decode("utf-8", "surrogateescape")
    broken = sum("\udc80" <= character <= "\udcff" for character in text)
    whole = sum(character > "\x7f" for character in text) - broken
    decoder = codecs.getincrementaldecoder("utf-8")()
    return whole > broken or (_decodes(decoder, sample, final=False) and len(decoder.getstate()[0]) > 1)


def _first_that_decodes(blocks: Iterator[bytes], names: list[str]) -> str | None:
    decoders = {name: codecs.getincrementaldecoder(name)() for name in names}
    for block in blocks:
        decoders = {name: decoder for name, decoder in decoders.items() if _decodes(decoder, block, final=False)}
    decoders = {name: decoder for name, decoder in decoders.items() if _decodes(decoder, b"", final=True)}
    return next(iter(decoders), None)


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, *, final: bool) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeError:
        return False
    return True


class Utf8Stream:
    """A stream of bytes in any encoding, read as UTF-8; DataError for bytes that the encoding does not have."""

    def __init__(self, stream: IO[bytes], encoding: str, place: str) -> None:
        self._stream, self._encoding, self._place = stream, encoding, place
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def read(self, size: int = -1) -> bytes:
        """About `size` bytes, at least one before the end."""
        while True:
            block = self._stream.read(size)
            try:
                text = self._decoder.decode(block, final=not block)
                if text or not block:
                    return text.encode()
            except UnicodeError as error:
                raise DataError(f"{self._place}: not valid {self._encoding}") from error
