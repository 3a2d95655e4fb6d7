"""What a terminal may be sent: strings from outside made harmless, and streams that never fail to print.

Names of files, domains, fields and messages of other libraries may hold what moves the cursor, turns text around, or is
no text at all. Such characters are shown as escapes.
"""

from __future__ import annotations

import io
import re
import sys

# Controls; marks that change the direction of text; characters that end a line; halves of surrogate pairs
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, most: int = 0) -> str:
    """`text` with escapes for what is unsafe to print, on one line; beyond `most` characters its middle is left out."""
    safe = UNSAFE.sub(escape, text)
    if most and len(safe) > most:
        safe = safe[: most // 2] + "…" + safe[len(safe) - (most - most // 2 - 1) :]
    return safe


def printable_lines(text: str) -> str:
    """`printable`, but line ends and tabs stay."""
    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)


def escape(match: re.Match[str]) -> str:
    """The character as `\\xHH` or `\\uHHHH`."""
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def mend_streams() -> None:
    """Let standard output and error show as escapes what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
