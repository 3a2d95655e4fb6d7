"""Reports of a run and of a comparison: one self-contained HTML file each."""

from moestro.report.comparison import write_comparison
from moestro.report.html import write_report

__all__ = ["write_comparison", "write_report"]
