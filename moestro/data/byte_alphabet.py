"""How byte-level vocabularies write bytes as characters, and which bytes no text contains."""

from __future__ import annotations

from typing import Final

# GPT-2's printable stand-ins: Latin-1 letters for themselves, other bytes from U+0100 on, in order
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHAR_TO_BYTE: Final = {chr(b): b for b in sorted(_PRINTABLE)} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
BYTE_TO_CHAR: Final = {byte: char for char, byte in CHAR_TO_BYTE.items()}
_TO_BYTES = {ord(char): byte for char, byte in CHAR_TO_BYTE.items()}
NEVER_IN_UTF8: Final = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
_ALPHABET = frozenset(CHAR_TO_BYTE)


def map_alphabet() -> dict[str, int]:
    """Each of the 256 characters and its byte."""
    return dict(CHAR_TO_BYTE)


def spell_bytes(data: bytes) -> str:
    """The characters that stand for bytes."""
    return data.decode("latin-1").translate(BYTE_TO_CHAR)


def read_bytes(text: str) -> bytes | None:
    """The bytes that characters stand for; None if one of them stands for none."""
    return text.translate(_TO_BYTES).encode("latin-1") if _ALPHABET.issuperset(text) else None
