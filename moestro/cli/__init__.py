"""The command line. Each command is one small module, imported only when it is called.

User errors print one line on standard error and exit with 2; a signal exits with 128 + its number.
"""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError

from moestro.errors import MoestroError
from moestro.terminal import mend_streams, printable
from moestro.version import __version__

app = App(
    name="moestro",
    help="Train, watch and talk to DeepSeek-style mixture-of-experts language models on the machine at hand.",
    version=f"moestro {__version__}",
)
app.command("moestro.cli.train:train", name="train")
app.command("moestro.cli.evaluate:evaluate", name="eval")
app.command("moestro.cli.ablate:ablate", name="ablate")
app.command("moestro.cli.generate:generate", name="generate")
app.command("moestro.cli.chat:chat", name="chat")
app.command("moestro.cli.serve:serve", name="serve")
app.command("moestro.cli.pack:pack", name="pack")
app.command("moestro.cli.convert:convert", name="convert")
app.command("moestro.cli.compare:compare", name="compare")
app.command("moestro.cli.report:report", name="report")
app.command("moestro.cli.inspect:inspect", name="inspect")
app.command("moestro.cli.init:init", name="init")
app.command("moestro.cli.doctor:doctor", name="doctor")


def main() -> None:
    """Entry point of the `moestro` script."""
    mend_streams()
    try:
        result = app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except MoestroError as error:
        print(f"moestro: {error.command_line_text}", file=sys.stderr)
        for detail in error.details:
            print(f"  {printable(detail)}", file=sys.stderr)
        sys.exit(2)
    except CycloptsError as error:
        print(f"moestro: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        print(printable(f"moestro: {error.filename or 'files'}: {error.strerror or error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("moestro: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)
