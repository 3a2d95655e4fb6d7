"""What commands tell the user to type works as it stands, and `--help` says what each command does."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Call

from moestro.cli import app
from moestro.cli.hints import command_name, format_command, spell_commands
from moestro.cli.table import COMMANDS, GROUPS

PACKAGE = Path(__file__).parent.parent.parent / "moestro"
NAMES = "|".join(command.name for command in COMMANDS)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `moestro` in an environment's folder, from whose parent it is called."""
    path = tmp_path / "home" / ".venv" / "bin" / "moestro"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path / "home")
    return path


@pytest.mark.parametrize("called", [".venv/bin/moestro", "./.venv/bin/moestro", "{path}"])
def test_a_program_off_the_path_is_named_by_where_it_is(
    program: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called.format(path=program)])
    assert command_name() == ".venv/bin/moestro"
    assert format_command("chat", Path("runs/my run")) == ".venv/bin/moestro chat 'runs/my run'"
    assert spell_commands("go on with `moestro eval x`") == "go on with `.venv/bin/moestro eval x`"
    monkeypatch.chdir(program.anchor + "usr")
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert command_name() == str(program)
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_name() == "moestro"


def test_a_program_of_the_same_name_on_the_path_is_another(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = program.parent.parent / "moestro"
    other.write_bytes(program.read_bytes())
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert command_name() == ".venv/bin/moestro"


def test_the_module_is_named_by_its_interpreter(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = program.with_name("python")
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["/somewhere/moestro/__main__.py"])
    assert command_name() == ".venv/bin/python -m moestro"


@pytest.mark.parametrize("called", ["/x/pytest/__main__.py", "train.py", "-c", ""])
def test_another_program_names_the_command(monkeypatch: pytest.MonkeyPatch, called: str) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert command_name() == "moestro"


@pytest.mark.parametrize("text", ["/data/moestro trains", "moestro is here", "x-moestro chat y", "moestro chatter"])
def test_other_words_stay(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/moestro"])
    assert spell_commands(text) == text


def printed_commands(source: str) -> list[str]:
    """Commands that are spelled out in what a source prints itself; errors are respelled when they are printed."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    prints = [call for call in calls if ast.unparse(call.func).startswith("print")]
    texts = [node for call in prints for node in ast.walk(call) if isinstance(node, ast.Constant)]
    return [str(text.value) for text in texts if re.search(rf"\bmoestro ({NAMES})\b", str(text.value))]


def test_no_hint_is_printed_as_if_the_program_were_on_the_path() -> None:
    assert printed_commands("print(f'  moestro chat {run}')") == ["  moestro chat "]
    found = {path.name: printed_commands(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    assert not {name: commands for name, commands in found.items() if commands}


def test_flags_in_hints_exist() -> None:
    """A hint may name a flag; then some command has it."""
    known = {
        name
        for command in COMMANDS
        for argument in app[command.name].assemble_argument_collection()
        for name in argument.names
    }
    found = set()
    for path in PACKAGE.rglob("*.py"):
        hints = [
            node.value
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.keyword) and node.arg == "hint"
        ]
        texts = [node.value for hint in hints for node in ast.walk(hint) if isinstance(node, ast.Constant)]
        found |= {flag for text in texts for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", str(text))}
    assert "--out" in found and found <= known


def test_commands_are_listed_in_the_order_of_work(call: Call) -> None:
    text = call("--help")[1]
    places = [text.index(f"─ {group} ─") for group in GROUPS]
    assert places == sorted(places)
    listed = re.findall(r"^│ (\w+)  +\S", text, re.MULTILINE)
    assert listed == [command.name for command in COMMANDS]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_line_and_an_example_that_parses(call: Call, command: object) -> None:
    name, example = command.name, command.example  # type: ignore[attr-defined]
    text = call(name, "--help")[1]
    assert f"Example: moestro {example}" in " ".join(text.split())
    words = shlex.split(example)
    assert words[0] == name
    app.parse_args(words, exit_on_error=False, print_error=False)
    summary = text.split("\n\n")[1]
    assert 10 < len(" ".join(summary.split())) < 90 and summary.strip()[-1] in ".;"


def test_mistyped_commands_and_options_are_answered_with_the_nearest(call: Call) -> None:
    for words, meant in ((("chta", "x"), "chat"), (("generate", "x", "--temprature", "1", "y"), "--temperature")):
        code, out, err = call(*words)
        assert (code, out) == (2, "") and f'"{meant}"' in err.replace(f"{meant}?", f'"{meant}"')


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    script = tmp_path / "moestro.bash"
    script.write_text(app.generate_completion(shell="bash"))
    ask = 'source "$1"; COMP_WORDS=($2 "$3" $4); COMP_CWORD=$5; _moestro; echo "${COMPREPLY[@]}"'

    def complete(*words: str) -> str:
        place = str(2 if words[1] else 1)
        arguments = ["bash", "-c", ask, "bash", str(script), "moestro", *words, place]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()

    assert complete("gen", "") == "generate"
    assert complete("generate", "--temp") == "--temperature"
