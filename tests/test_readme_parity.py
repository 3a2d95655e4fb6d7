"""The documents under test: both READMEs give the same commands and programs, and they work.

Commands are the lines of fenced bash blocks, comments taken off, continued lines joined. In README.md and docs/, the
line before a block with a `moestro` command, and before every block of Python, says what becomes of it here:

    <!-- run -->              run as it stands; blocks of one document run in order in one empty folder
    <!-- skip: reason -->     only parsed
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n\s*)?^```(?P<language>bash|sh|shell|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SECONDS_PER_BLOCK = 900


@dataclass(frozen=True)
class Block:
    """One fenced block of bash or Python: the mark before it ("" for none) and its text."""

    mark: str
    body: str
    is_python: bool = False

    @property
    def program(self) -> list[str]:
        """What runs it."""
        return [sys.executable, "-c", self.body] if self.is_python else ["bash", "-euo", "pipefail", "-c", self.body]

    @property
    def commands(self) -> list[str]:
        """Its commands, one line each, spacing between words made single; a program is one of many lines."""
        if self.is_python:
            return [self.body]
        lines = self.body.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True, posix=False) for line in lines]
        return [" ".join(line) for line in words if line]

    @property
    def moestro_commands(self) -> list[list[str]]:
        """Arguments of every `moestro` command: from its name to a pipe or redirection."""
        found = []
        for command in [] if self.is_python else self.commands:
            lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True  # a comma inside a word is no end of it
            words = list(lexer)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            end = next((place for place, word in enumerate(words) if set(word) <= set("|&;<>()")), len(words))
            if words and words[0] == "moestro":
                found.append(words[1:end])
        return found


def read_blocks(text: str) -> list[Block]:
    """The blocks of bash and Python of a Markdown text, in order."""
    found = BLOCK.finditer(text)
    return [Block(match["mark"] or "", match["body"], match["language"] == "python") for match in found]


def test_both_readmes_give_the_same_commands() -> None:
    english, korean = (
        [command for block in read_blocks((ROOT / name).read_text("utf-8")) for command in block.commands]
        for name in ("README.md", "README.ko.md")
    )
    assert english, "README.md has no bash block"
    assert korean == english


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_whether_it_runs(path: Path) -> None:
    wrong = [
        block.body.splitlines()[0]
        for block in read_blocks(path.read_text("utf-8"))
        if (block.moestro_commands or block.is_python) and not re.fullmatch(r"run|skip: .+", block.mark)
    ]
    assert not wrong, f"{path.name}: put <!-- run --> or <!-- skip: reason --> before the blocks of {wrong}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_parses(path: Path) -> None:
    blocks = read_blocks(path.read_text("utf-8"))
    commands = [words for block in blocks for words in block.moestro_commands]
    programs = [block.body for block in blocks if block.is_python]
    if not commands and not programs:
        pytest.skip("no moestro command")
    for program in programs:
        compile(program, path.name, "exec")
    app = importlib.import_module("moestro.cli").app
    for words in commands:
        try:
            app.parse_args(words, exit_on_error=False, print_error=False)
        except Exception as error:
            pytest.fail(f"{path.name}: moestro {shlex.join(words)}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_marked_blocks_run(path: Path, tmp_path: Path) -> None:
    """As a reader would: one empty folder, this environment's `moestro` first on the path, no stdin."""
    blocks = [block for block in read_blocks(path.read_text("utf-8")) if block.mark == "run"]
    if not blocks:
        pytest.skip("no block to run")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks:
        run = subprocess.run(
            block.program,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS_PER_BLOCK,
        )
        assert run.returncode == 0, f"{path.name}: exit code {run.returncode} of\n{block.body}\n{run.stdout[-2000:]}"


def test_blocks_are_found_with_their_marks() -> None:
    text = (
        "<!-- run -->\n```bash\nmoestro a\n```\n\n<!-- skip: needs a GPU -->\n\n```sh\nmoestro b\n```\n"
        "```python\nmoestro = 1\n```\n<!-- a remark -->\ntext\n```bash\nmake demo\n```\n"
    )
    blocks = read_blocks(text)
    assert [(block.mark, block.body) for block in blocks] == [
        ("run", "moestro a\n"),
        ("skip: needs a GPU", "moestro b\n"),
        ("", "moestro = 1\n"),
        ("", "make demo\n"),
    ]
    assert [block.is_python for block in blocks] == [False, False, True, False]


def test_commands_lose_comments_and_continuations_but_not_quotes() -> None:
    block = Block("", "# a comment\nmake  demo   # ten minutes\nmoestro train \\\n  --data 'a #b' \\\n  x=1\n\n")
    assert block.commands == ["make demo", "moestro train --data 'a #b' x=1"]
    assert block.moestro_commands == [["train", "--data", "a #b", "x=1"]]


def test_only_the_moestro_part_of_a_line_is_parsed() -> None:
    block = Block("", "OMP_NUM_THREADS=2 moestro inspect demo --json | head -1\nmoestro-other x\necho moestro\n")
    assert block.moestro_commands == [["inspect", "demo", "--json"]]
