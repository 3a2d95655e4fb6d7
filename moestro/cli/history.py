"""Editing lines in the terminal, and what was typed before: arrows, Ctrl-R, a private file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_LINES = 1000


def history_file() -> Path:
    """Where lines are kept, by the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "moestro" / "chat_history"


@contextmanager
def line_editing() -> Iterator[None]:
    """Edit lines with readline, where there is one, and keep them in a file that only the user may read."""
    try:
        import readline
    except ImportError:  # Windows has line editing of its own
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    path = history_file()
    with suppress(OSError):  # without a file there is no history, and no harm
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
        readline.read_history_file(path)
    readline.set_history_length(MAX_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)
