"""The report of whatever a directory holds."""

from __future__ import annotations

from pathlib import Path

from moestro.compare.results import REQUEST
from moestro.report.comparison import write_comparison, write_comparison_figures
from moestro.report.html import write_report, write_run_figures


def report(directory: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run or of a comparison, by default to report.html in its directory; returns the file.

    MoestroError if the directory is neither, or if the file cannot be written.
    """
    source, target = Path(directory), None if out is None else Path(out)
    write = write_comparison if (source / REQUEST).is_file() else write_report
    return write(source, target)


def write_figures(directory: str | Path, folder: str | Path) -> list[Path]:
    """Write every figure of the report to `folder`, as SVG and CSV; returns the files. Raises as `report` does."""
    source = Path(directory)
    write = write_comparison_figures if (source / REQUEST).is_file() else write_run_figures
    return write(source, Path(folder))
