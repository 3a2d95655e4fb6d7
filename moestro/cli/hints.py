"""Commands as the user can type them here.

Installed by `make`, the program lies in `.venv/bin` and is not on the path. Every hint and every "next" line therefore
names it by `command_name`. Texts of the library say `moestro COMMAND`; `spell_commands` replaces that word.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from moestro.cli.table import COMMANDS

_MENTION = re.compile(rf"(?<![\w/.-])moestro(?= (?:{'|'.join(command.name for command in COMMANDS)}|--help)\b)")


def command_name() -> str:
    """What starts this program from the current directory, quoted for a shell: `moestro` if the path finds it.

    In another program, which only uses the library, it is `moestro`, too.
    """
    program = Path(sys.argv[0])
    if program.parts[-2:] == ("moestro", "__main__.py"):
        return f"{_spell_program(sys.executable)} -m moestro"
    return _spell_program(sys.argv[0]) if program.stem == "moestro" else "moestro"


def format_command(*words: str | Path) -> str:
    """A command with its arguments, quoted for a shell."""
    return " ".join([command_name(), *(shlex.quote(str(word)) for word in words)])


def spell_commands(text: str) -> str:
    """The text with `moestro COMMAND` as the user can type it."""
    name = command_name()
    return _MENTION.sub(lambda _: name, text)


def _spell_program(program: str) -> str:
    """The name if the path finds this very program, else the path, relative if it is below the current directory."""
    name = os.path.basename(program)
    if not os.path.dirname(program) or _same_file(shutil.which(name), program):
        return shlex.quote(name)
    path = os.path.abspath(program)
    relative = os.path.relpath(path)
    return shlex.quote(path if relative.startswith(os.pardir) else relative)


def _same_file(found: str | None, program: str) -> bool:
    """Whether two paths name one directory entry. Links are not followed: every environment's python is one."""
    return found is not None and os.path.abspath(found) == os.path.abspath(program)
