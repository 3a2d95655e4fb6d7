"""Reports of a run and of a comparison: one self-contained HTML file each."""

from moestro.report.comparison import write_comparison, write_comparison_figures
from moestro.report.html import write_report, write_run_figures

__all__ = ["write_comparison", "write_comparison_figures", "write_report", "write_run_figures"]
