"""What a call of a command gives, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Result = tuple[int, str, str]  # exit code, standard output, standard error
Call = Callable[..., Result]


def last_json(result: Result) -> dict[str, Any]:
    """The JSON on the last line of a command that succeeded."""
    code, out, err = result
    assert code == 0, err
    tree: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return tree
