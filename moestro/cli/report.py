"""`moestro report`: one HTML file that shows a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moestro.cli.output import print_json


def report(
    run: Path,
    *,
    out: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Write the report of a run: losses, loads, experts by domain, biases, samples. No network needed to view it.

    Parameters
    ----------
    run
        A run directory.
    out
        Where to write; RUN/report.html by default.
    json_output
        Print {"report": path} instead of the path.
    """
    from moestro.report import write_report

    path = write_report(run, out)
    if json_output:
        print_json({"report": str(path)})
    else:
        print(path)
