"""Comparing routers: cells of equal cost, runs over seeds, and what follows from them.

`moestro.compare(...)` is `moestro.compare.comparison.compare`.
"""

from moestro.packages import make_callable

make_callable(__name__, "moestro.compare.comparison")
