"""How byte-level vocabularies write bytes as characters, and which bytes no text contains."""

from __future__ import annotations

from typing import Final

# GPT-2's printable stand-ins: Latin-1 letters for themselves, other bytes from U+0100 on, in order
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHAR_TO_BYTE: Final = {chr(b): b for b in sorted(_PRINTABLE)} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
BYTE_TO_CHAR: Final = {byte: char for char, byte in CHAR_TO_BYTE.items()}
NEVER_IN_UTF8: Final = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
