"""Errors that the user can fix: one clear line, exit code 2, no traceback. And notices: one line, and it goes on."""

import logging
from functools import cache

from moestro.terminal import printable


class MoestroError(Exception):
    """Bad input. The message says what is wrong, in terms of arguments; `hint` says what to do on the command line.

    `details` are lines of a list that the message sums up, such as every file that cannot be read.
    """

    def __init__(self, message: str = "", *, hint: str | None = None, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.hint = hint
        self.details = details

    @property
    def command_line_text(self) -> str:
        """The message and its hint, on one line that is safe to print."""
        return printable(" ".join((f"{self}; {self.hint}" if self.hint else str(self)).split()))


class ConfigError(MoestroError):
    """A key, value or combination that no run can use."""


class DataError(MoestroError):
    """Text, tokenizer or shards that cannot be read."""


class CheckpointError(MoestroError):
    """A model directory that is incomplete, damaged or of an unsupported kind."""


@cache
def notice(text: str) -> None:
    """Say something that is no error, once: a warning of the logger `moestro`, which goes to standard error."""
    logging.getLogger("moestro").warning("%s", printable(" ".join(text.split())))
