"""How commands print for programs and for people, and read standard input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from moestro.cli.hints import spell_commands
from moestro.errors import DataError, MoestroError
from moestro.terminal import UNSAFE, printable, printable_lines


def print_json(tree: Mapping[str, Any]) -> None:
    """Print a JSON object on one line of standard output, the last line of a command."""
    is_utf8 = "utf" in (sys.stdout.encoding or "").lower()
    text = json.dumps(tree, ensure_ascii=not is_utf8)
    print(UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)


def print_rows(rows: Sequence[tuple[str, str]], stream: TextIO | None = None) -> None:
    """Print aligned names and values, one pair a line, on standard output or another stream."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{printable(name):<{width}}  {printable(value)}", file=stream)


def read_input(read: Callable[[], str]) -> str:
    """Text from standard input; DataError if it is not valid UTF-8."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not valid UTF-8 ({error.reason})") from error


def print_note(text: str) -> None:
    """Print a remark for people on standard error."""
    if sys.stderr is not None:
        with suppress(OSError):  # a terminal that has closed
            print(printable_lines(text), file=sys.stderr)


def print_error(error: MoestroError) -> None:
    """Print what the user can mend, and how, on one line of standard error, and below it what the line sums up."""
    print_note(f"moestro: {spell_commands(error.command_line_text)}")
    for detail in error.details:
        print_note(f"  {printable(detail)}")


@contextmanager
def outlive_output() -> Iterator[None]:
    """Print what there is to print inside `with`; if nobody reads it or nothing fits, go on without a word.

    For work whose result is in files: its exit code must not depend on who listens.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered would fail again when the process ends
