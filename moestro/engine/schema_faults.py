"""Says what in a JSON schema cannot be followed, and where: the compiler tells the reason, but not the place.

schema -> every schema in it, alone -> the first that the compiler refuses -> "at #/properties/p: …"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

# Keywords with a schema, with schemas by name, and with a list of schemas.
ONE = ("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "propertyNames",
       "not", "if", "then", "else", "contains", "contentSchema")  # fmt: skip
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_REGEX = re.compile(r"regex parse error:\n(?P<lines>.*)\nerror: (?P<reason>[^\n]*)", re.DOTALL)
_PREFIX = re.compile(r"^(?:at \d+\(\d+\): )?(?:failed to compile JSON schema: )?")
_UNKNOWN = re.compile(r"Unimplemented keys: \[(.*)\]")
MAX_CHARS = 100
MAX_SEARCHED = 500  # schemas that are compiled to find the fault, under a millisecond each


def find_fault(schema: Any, compile_alone: Callable[[Mapping[str, Any] | bool], str]) -> str:
    """What is wrong with the first schema at fault, with its JSON pointer; empty if none of them is, alone.

    `compile_alone` returns the compiler's complaint about a schema, or nothing.
    """
    for pointer, node in islice(_walk(schema), MAX_SEARCHED):
        if not isinstance(node, Mapping):
            continue
        target = node.get("$ref")
        if isinstance(target, str) and target.startswith("#/") and not _has(schema, target):
            return f"at {pointer}/$ref: there is no {target[:MAX_CHARS]}"
        error = compile_alone(_alone(node))
        if error:
            return f"at {pointer}: {say_fault(error)}"
    return ""


def say_fault(error: str) -> str:
    """The compiler's complaint in one line; for a regular expression with the place in it."""
    error = _PREFIX.sub("", error.strip())
    unknown, regex = _UNKNOWN.match(error), _REGEX.search(error)
    if unknown:
        return f"{unknown[1][:MAX_CHARS]} is not supported"
    if regex:
        lines = regex["lines"].splitlines()
        marks = [line for line in lines if line.strip() and not line.strip(" ^")]
        place = f", at its character {marks[0].index('^') - 3}" if len(lines) == 2 and marks else ""
        return f"invalid regex '{lines[0].strip()[:MAX_CHARS]}'{place}: {regex['reason'][:MAX_CHARS]}"
    return (error.splitlines() or ["unknown reason"])[0][:MAX_CHARS]


def _walk(schema: Any) -> Iterator[tuple[str, Any]]:
    """All schemas within a schema, from the outside in, with their JSON pointers. No recursion."""
    waiting: list[tuple[str, Any]] = [("#", schema)]
    for pointer, node in waiting:
        yield pointer, node
        if isinstance(node, Mapping):
            waiting += [(f"{pointer}/{place}", child) for place, child in _children(node)]


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if key in LISTED and isinstance(value, list):
            yield from ((f"{key}/{index}", child) for index, child in enumerate(value))
        elif key in NAMED and isinstance(value, Mapping):
            yield from ((f"{key}/{_escape(name)}", child) for name, child in value.items())
        elif key in ONE:
            yield key, value


def _alone(node: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without what the schemas within it demand, and without references."""
    plain: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("$ref", "$id", "$defs", "definitions") and not str(value).startswith("http"):
            continue
        if key in LISTED and isinstance(value, list):
            plain[key] = [True] * len(value)
        elif key in NAMED and isinstance(value, Mapping):
            plain[key] = dict.fromkeys(value, True)
        else:
            plain[key] = True if key in ONE and isinstance(value, Mapping) else value
    return plain


def _has(schema: Any, target: str) -> bool:
    """Whether a local JSON pointer leads anywhere."""
    for part in target[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping) and name in schema:
            schema = schema[name]
        elif isinstance(schema, list) and name.isdigit() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return False
    return True


def _escape(name: object) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")[:MAX_CHARS]
