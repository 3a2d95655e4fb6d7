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
    figures: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Write the report of a run or of a comparison, one HTML file.

    A run's has losses, loads, experts by domain, biases and samples. No network is needed to view it.

    Parameters
    ----------
    run
        A run directory, or that of a comparison.
    out
        Where to write; report.html in the directory by default.
    figures
        A folder for every figure besides, as NAME.svg and NAME.csv. The page's buttons save PNG, too.
    json_output
        Print {"report": path, "figures": [paths]} instead of the paths.
    """
    from moestro.report.writing import report as write
    from moestro.report.writing import write_figures

    path = write(run, out)
    paths = [] if figures is None else write_figures(run, figures)
    if json_output:
        print_json({"report": str(path), "figures": [str(figure) for figure in paths]})
    else:
        print(path, *paths, sep="\n")
