"""How commands print for programs and for people, and read standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moestro.cli.hints import spell_commands
from moestro.errors import DataError, MoestroError
from moestro.terminal import UNSAFE, printable, printable_lines


def print_json(tree: Mapping[str, Any]) -> None:
    """Print a JSON object on one line of standard output, the last line of a command."""
    is_utf8 = "utf" in (sys.stdout.encoding or "").lower()
    text = json.dumps(tree, ensure_ascii=not is_utf8)
    print(UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print aligned names and values, one pair a line."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{printable(name):<{width}}  {printable(value)}")


def read_input(read: Callable[[], str]) -> str:
    """Text from standard input; DataError if it is not valid UTF-8."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not valid UTF-8 ({error.reason})") from error


def print_note(text: str) -> None:
    """Print a remark for people on standard error."""
    print(printable_lines(text), file=sys.stderr)


def print_error(error: MoestroError) -> None:
    """Print what the user can mend, and how, on one line of standard error, and below it what the line sums up."""
    print_note(f"moestro: {spell_commands(error.command_line_text)}")
    for detail in error.details:
        print_note(f"  {printable(detail)}")
