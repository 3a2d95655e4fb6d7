"""Strings from outside reach a terminal as text and nothing else, in any encoding."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moestro.errors import ConfigError
from moestro.terminal import printable, printable_lines

ROOT = os.path.dirname(os.path.dirname(__file__))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é 한글 😀 \u3000x", "plain, é 한글 😀 \u3000x"),
        ("\x1b[2J\r\n\t\x07", "\\x1b[2J\\x0d\\x0a\\x09\\x07"),
        ("\x9b31m \x7f", "\\x9b31m \\x7f"),
        ("a\u202eb\u2066c\u2028d", "a\\u202eb\\u2066c\\u2028d"),
        (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


def test_long_strings_lose_their_middle() -> None:
    assert printable("abcdefghij", 5) == "ab…ij"
    assert printable("abcde", 5) == "abcde"


def test_lines_and_tabs_of_longer_texts_stay() -> None:
    assert printable_lines("one\ttwo\n\x1bthree") == "one\ttwo\n\\x1bthree"


def test_errors_are_safe_to_print() -> None:
    assert ConfigError("no \x1b[2J").command_line_text == "no \\x1b[2J"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
@pytest.mark.parametrize(
    "command", [["--help"], ["train", "--help"], ["inspect", "demo"], ["train", "--data", "한글 \x1b"]]
)
def test_every_terminal_can_be_printed_on(environment: dict[str, str], command: list[str]) -> None:
    variables = {**os.environ, "PYTHONPATH": ROOT, "PYTHONCOERCECLOCALE": "0", **environment}
    done = subprocess.run([sys.executable, "-m", "moestro", *command], capture_output=True, env=variables, timeout=120)
    assert done.returncode == (2 if "--data" in command else 0), done.stderr
    assert b"Traceback" not in done.stderr and b"\x1b" not in done.stderr
