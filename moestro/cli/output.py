"""What commands print for programs and for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(tree: Mapping[str, Any]) -> None:
    """One JSON object on one line of standard output, the last line of a command."""
    print(json.dumps(tree, ensure_ascii=False), flush=True)


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Aligned name and value, one a line."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def print_note(text: str) -> None:
    """A remark for people, on standard error."""
    print(text, file=sys.stderr)
