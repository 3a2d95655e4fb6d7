"""One run of a comparison as a process: `python -m moestro.compare.worker CONFIG RUN`.

Starts the run or goes on with it, without progress and without a report. SIGTERM saves a checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moestro import machine
from moestro.config import SETTINGS, build_config, load_file
from moestro.errors import MoestroError
from moestro.training.loop import train
from moestro.training.signals import Interrupted


def main(config: Path, run: Path) -> int:
    """Train to the end or to a signal; returns the exit code."""
    try:
        settings = build_config(load_file(config))
        machine.use_threads(settings.train.threads)
        machine.keep_freed_memory()
        outcome = train(settings, run, resume=(run / SETTINGS).exists(), quiet=True)
    except Interrupted as error:
        print(f"stopped by signal {error.number} before the first step", file=sys.stderr)
        return 128 + error.number
    except MoestroError as error:
        print(error.command_line_text, file=sys.stderr)
        return 2
    if outcome.stopped_by is not None:
        print(f"stopped by signal {outcome.stopped_by} at step {outcome.step}", file=sys.stderr)
        return 128 + outcome.stopped_by
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
