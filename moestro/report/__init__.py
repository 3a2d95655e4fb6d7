"""Reports of a run and of a comparison: one self-contained HTML file each.

`moestro.report(...)` is `moestro.report.writing.report`.
"""

from moestro.packages import make_callable
from moestro.report.comparison import write_comparison
from moestro.report.html import write_report

__all__ = ["write_comparison", "write_report"]

make_callable(__name__, "moestro.report.writing")
