"""`/docs`: every route and its fields as one page without scripts, made from the server's own OpenAPI description.

The usual pages load a megabyte of scripts from elsewhere; this one works offline and under the strictest policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from moestro.server.fields import HARMLESS, REFUSED

STYLE = """\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h2 { border-top: 1px solid #8886; font: 600 1.1rem ui-monospace, monospace; margin-top: 2rem; padding-top: 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; width: 100%; }
th, td { border-bottom: 1px solid #8883; padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; vertical-align: top; }
"""
Tree = dict[str, Any]
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Moestro's API</title><link rel="stylesheet" href="/docs.css">
<h1>Moestro {version}</h1>
<p>The same as JSON: <a href="/openapi.json">/openapi.json</a>. Try a route with curl, or talk to the model on
<a href="/">the page</a>.</p>
{routes}
<h2>Fields that are taken and change nothing</h2>
<p>{harmless}</p>
<h2>Fields that are refused, unless they ask for nothing</h2>
{refused}
</html>
"""


def render_docs(description: Tree) -> str:
    """The page for an OpenAPI description."""
    routes = "\n".join(_routes(description))
    rows = (f"<tr><td><code>{field}</code><td>{escape(instead)}" for field, (_, instead) in sorted(REFUSED.items()))
    return _PAGE.format(
        version=escape(description["info"]["version"]),
        routes=routes,
        harmless=", ".join(f"<code>{field}</code>" for field in sorted(HARMLESS)),
        refused="<table><tr><th>field<th>instead" + "".join(rows) + "</table>",
    )


def _routes(description: Tree) -> Iterator[str]:
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield f"<h2>{method.upper()} {escape(path)}</h2>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            body = operation.get("requestBody")
            if body is not None:
                schema = body["content"]["application/json"]["schema"]
                yield from _fields(description, _resolve(description, schema))


def _fields(description: Tree, schema: Tree) -> Iterator[str]:
    yield "<table><tr><th>field<th>type<th>"
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        note = field.get("description", "")
        note = f"required. {note}" if name in required else note
        yield f"<tr><td><code>{escape(name)}</code><td>{escape(_type(description, field))}<td>{escape(note)}"
    yield "</table>"


def _type(description: Tree, schema: Tree, depth: int = 0) -> str:
    """A type in words, two levels deep."""
    if "$ref" in schema:
        found = _resolve(description, schema)
        names = ", ".join(found.get("properties", {}))
        return f"{{{names}}}" if names and depth < 2 else "object"
    if "anyOf" in schema:
        kinds = (_type(description, kind, depth) for kind in schema["anyOf"] if kind.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(description, schema.get('items', {}), depth + 1)}"
    bounds = [f"{sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in schema]
    return " ".join([str(schema.get("type", "anything")), *bounds])


def _resolve(description: Tree, schema: Tree) -> Tree:
    """The schema that a reference within the description means."""
    found: Tree = description
    if "$ref" not in schema:
        return schema
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found
