"""`moestro settings`: every setting of a run, from the fields of `config.py`. docs/settings.md is made here."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from moestro.cli.output import print_json
from moestro.config import Config, suggest_key
from moestro.errors import ConfigError

SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "a multiple of"}

PAGE = """\
# Settings

Made by `moestro settings --markdown` from the fields of [`config.py`](../moestro/config.py). `moestro train` and
`moestro compare --set` take any of them as `section.key=value`. A configuration file has them in sections: `lr = 0.001`
below `[train]`, `score = "softmax"` below `[model.router]`. Values are TOML, or plain words. The defaults are those of
an empty configuration; presets ([`moestro/presets`](../moestro/presets)) change some.
"""


def settings(
    name: str = "",
    /,
    *,
    markdown: Annotated[bool, Parameter(negative="")] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """List every setting: default, unit, range and meaning.

    Parameters
    ----------
    name
        A setting, a section or a part of a name: train.lr, model.router, lr.
    markdown
        Print the page docs/settings.md.
    json_output
        Print {"settings": [{"name", "default", "unit", "values", "meaning"}]} on one line.
    """
    found = [entry for entry in list_settings(Config) if is_named(entry["name"], name)]
    if not found:
        raise ConfigError(f"no setting '{name}'{suggest_key(name)}", hint="`moestro settings` lists them all")
    if json_output:
        print_json({"settings": found})
    elif markdown:
        print(make_page(found), end="")
    else:
        print_settings(found)


def is_named(setting: str, name: str) -> bool:
    """Whether a name means this setting: nothing, all of its parts, or some that follow each other."""
    return not name or f".{name}." in f".{setting.replace('[]', '')}."


def list_settings(model: type[BaseModel], prefix: str = "") -> Iterator[dict[str, Any]]:
    """Name, default, unit, allowed values and meaning of every field below a configuration."""
    for key, field in model.model_fields.items():
        name, kind = prefix + key, field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from list_settings(kind, f"{name}.")
            continue
        yield describe(name, field)
        for item in get_args(kind):
            if isinstance(item, type) and issubclass(item, BaseModel):  # a list of sections
                yield from list_settings(item, f"{name}[].")


def describe(name: str, field: FieldInfo) -> dict[str, Any]:
    """One setting; what has to be given has the default null."""
    extra = field.json_schema_extra
    return {
        "name": name,
        "default": None if field.is_required() else to_jsonable_python(field.default),
        "unit": str(extra.get("unit", "")) if isinstance(extra, dict) else "",
        "values": describe_values(field.annotation, field.metadata),
        "meaning": field.description or "",
    }


def describe_values(kind: Any, metadata: list[Any]) -> str:
    """The choices, or the type with its bounds."""
    origin, items = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, items))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_values(item, []) for item in items)
    if origin is Annotated:
        return describe_values(items[0], list(items[1:]))
    if origin is tuple:
        shown = [item for item in items if item is not Ellipsis]
        if len(shown) > 1:
            return f"{len(shown)} × {describe_values(shown[0], [])}"
        return "a list of names" if shown == [str] else "a list of sections"
    if origin is dict:
        return "a number for each name"
    words = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "none"}
    bounds = [
        f"{sign} {getattr(bound, key):g}" for bound in metadata for key, sign in SIGNS.items() if hasattr(bound, key)
    ]
    return " ".join([words.get(kind, str(kind)), ", ".join(bounds)]).strip()


def show_value(value: Any) -> str:
    """A default as one can type it after `=`: TOML, or a plain word."""
    return value or '""' if isinstance(value, str) else "–" if value is None else format_toml(value)


def format_toml(value: Any) -> str:
    """A value in TOML."""
    match value:
        case str():
            return json.dumps(value)
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list() | tuple():
            return "[" + ", ".join(map(format_toml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{key} = {format_toml(item)}" for key, item in value.items()) + "}"
    return str(value)


def print_settings(found: list[dict[str, Any]]) -> None:
    """Two lines for each: what can be typed, with its unit and values, and what it means."""
    for entry in found:
        kind = "; ".join(filter(None, (entry["unit"], entry["values"])))
        print(f"{entry['name']}={show_value(entry['default'])}  ({kind})\n    {entry['meaning']}")


def make_page(found: list[dict[str, Any]]) -> str:
    """docs/settings.md: a table for each section."""
    lines, section = [PAGE], ""
    for entry in found:
        own = entry["name"].rpartition(".")[0]
        if own != section:
            section = own
            lines.append(f"\n## {section}\n\n| setting | default | unit | values | meaning |\n|---|---|---|---|---|\n")
        cells = (
            f"`{entry['name']}`",
            f"`{show_value(entry['default'])}`",
            entry["unit"],
            entry["values"],
            entry["meaning"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(lines)
