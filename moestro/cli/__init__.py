"""The command line. Each command is one small module, imported only when it is called; `table.py` lists them.

User errors print one line on standard error and exit with 2; a signal exits with 128 + its number.
"""

from __future__ import annotations

import signal
import sys

from cyclopts import App, CycloptsError, Group

from moestro.cli.hints import command_name
from moestro.cli.output import print_error, print_note
from moestro.cli.table import COMMANDS, GROUPS
from moestro.errors import MoestroError
from moestro.terminal import mend_streams
from moestro.version import __version__

app = App(
    name="moestro",
    help="Train, watch and talk to DeepSeek-style mixture-of-experts language models on the machine at hand.",
    version=f"moestro {__version__}",
    group_commands=Group("Options", sort_key=len(GROUPS)),
)
app.register_install_completion_command(
    help="Let the shell complete commands and options: writes a script and a line in the shell's startup file."
)
_GROUPS = {name: Group(name, sort_key=place) for place, name in enumerate(GROUPS)}
for _place, _command in enumerate(COMMANDS):
    app.command(
        f"moestro.cli.{_command.function}",
        name=_command.name,
        group=_GROUPS[_command.group],
        sort_key=_place,
        help_epilogue=f"Example: {command_name()} {_command.example}",
    )


def main() -> None:
    """Entry point of the `moestro` script."""
    mend_streams()
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        for command in COMMANDS:  # imports it: a list of commands says what each does
            _ = app[command.name]
    try:
        result = app(spell_dash(sys.argv[1:]), exit_on_error=False, print_error=False, result_action="return_value")
    except MoestroError as error:
        print_error(error)
        sys.exit(2)
    except CycloptsError as error:
        print_note(f"moestro: {' '.join(str(error).split())}")
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        print_note(f"moestro: {error.filename or 'files'}: {error.strerror or error}")
        sys.exit(2)
    except Exception as error:
        from moestro.machine import is_memory_error

        if not is_memory_error(error):
            raise
        print_note("moestro: there is not enough memory; moestro inspect says what a model takes")
        sys.exit(2)
    except KeyboardInterrupt as error:
        print_note("moestro: interrupted")
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
    sys.exit(result if isinstance(result, int) else 0)


def spell_dash(words: list[str]) -> list[str]:
    """The arguments, with a lone - of `generate` as --prompt=-: the parser takes it for an option without a name."""
    if words[:1] != ["generate"]:
        return words
    pairs = zip(["", *words], words, strict=False)
    return ["--prompt=-" if word == "-" and before != "--prompt" else word for before, word in pairs]
