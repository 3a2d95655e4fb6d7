"""The documents under test: both READMEs say the same and give the same commands and programs, and these work.

Commands are the lines of fenced bash blocks, comments taken off, continued lines joined. In README.md and docs/, the
line before a block with a `moestro` command, and before every block of Python, says what becomes of it here:

    <!-- run -->              run as it stands; blocks of one document run in order in one empty folder
    <!-- skip: reason -->     only parsed
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n\s*)?^```(?P<language>bash|sh|shell|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SECONDS_PER_BLOCK = 900
READMES = ("README.md", "README.ko.md")


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


def read_outline(text: str) -> list[str]:
    """What a translation keeps of a Markdown text, a line for each block: its tag, then what `read_facts` finds in it.

    Tags are those of HTML (h2, p, ol, li, tr, td, …): headings, lists and tables must agree in level, order and size.
    """
    outline = []
    tag = ""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.nesting == 1:
            tag = token.tag
            outline.append(tag)
        elif token.type == "inline":
            outline.append(" ".join([tag, *read_facts(token, in_order=tag in ("th", "td"))]))
        elif token.type in ("fence", "html_block"):
            outline.append(f"{token.type} {token.info or token.content.strip()}")
    return outline


def read_facts(inline: Token, in_order: bool) -> list[str]:
    """Targets of links and pictures in order; then code and digits, sorted in prose, where word order differs."""
    targets, values = [], []
    for token in inline.children or []:
        target = token.attrs.get("href", token.attrs.get("src"))
        if target is not None:
            targets.append("the other README" if target in READMES else f"{token.type} {target}")
        elif token.type == "code_inline":
            values.append(f"`{token.content}`")
        elif token.type == "text":
            values += re.findall(r"\d+(?:\.\d+)?", token.content)
    return targets + (values if in_order else sorted(values))


def test_both_readmes_say_the_same() -> None:
    english, korean = (read_outline((ROOT / name).read_text("utf-8")) for name in READMES)
    assert any(line.startswith("td ") for line in english), "README.md has no table"
    difference = difflib.unified_diff(english, korean, *READMES, lineterm="", n=2)
    assert korean == english, "\n".join(difference)


def test_both_readmes_give_the_same_commands() -> None:
    english, korean = (
        [command for block in read_blocks((ROOT / name).read_text("utf-8")) for command in block.commands]
        for name in READMES
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


OUTLINED = """# A title

A [page](docs/a.md) of 3 words and `code`, in [Korean](README.ko.md).

| speed | `a` |
|---|---|
| 16 streams | 8.4 / 7.3 |

- [first](docs/b.md): 2.5
- second
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# A title", "## A title"),
        ("docs/a.md", "docs/b.md"),
        ("3 words", "4 words"),
        ("`code`", "code"),
        ("| 16 streams", "| streams"),
        ("8.4 / 7.3", "7.3 / 8.4"),
        ("| 16 streams | 8.4 / 7.3 |\n", ""),
        ("docs/b.md", "docs/c.md"),
        ("- second\n", ""),
        ("- second", "\nsecond"),
        (" in [Korean](README.ko.md).", " in Korean."),
    ],
)
def test_outlines_differ_where_facts_do(old: str, new: str) -> None:
    assert OUTLINED.count(old) == 1
    assert read_outline(OUTLINED.replace(old, new)) != read_outline(OUTLINED)


def test_outlines_of_a_translation_agree() -> None:
    translated = (
        OUTLINED.replace("# A title", "# 제목")
        .replace(
            "A [page](docs/a.md) of 3 words and `code`, in [Korean]", "`code`와 단어 3개의 [쪽](docs/a.md), [영어]"
        )
        .replace("README.ko.md", "README.md")
        .replace("16 streams", "동시 요청 16개")
    )
    assert read_outline(translated) == read_outline(OUTLINED)


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
