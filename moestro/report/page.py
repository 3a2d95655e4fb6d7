"""A page as one HTML file that needs nothing else: no network, no server, no other file.

Templates escape every text. The figures' data are in a JSON block in which `<`, `>` and `&` are escaped. The
page's policy allows no requests, and only the style and script written here, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moestro.errors import MoestroError
from moestro.report.tiles import format_count, format_seconds
from moestro.training import metrics as log


def render_page(
    template: str, styles: Sequence[str], scripts: Sequence[str], data: Any, context: Mapping[str, Any]
) -> str:
    """The page as text: an asset used as a Jinja template, with `context`, style, script and `data` for the script."""
    style, script = _assets(styles), _assets(scripts)
    loader = jinja2.FunctionLoader(_asset)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"count": format_count, "seconds": format_seconds}
    return environment.get_template(template).render(
        context,
        data=Markup(_script_json(data)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def write_page(page: str, default: Path, out: Path | None) -> Path:
    """Write a page to `out`, or to `default`; if `out` is a folder, under the default's name. Returns the path.

    Raises `MoestroError` if the place cannot be written.
    """
    target = out or default
    target = target / default.name if target.is_dir() else target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        log.write_atomic(target, page.encode("utf-8", "replace"))
    except OSError as error:
        raise MoestroError(f"cannot write the report {target}: {error.strerror}") from error
    return target


def _script_json(value: Any) -> str:
    """JSON that cannot end its script element: `<`, `>` and `&` as \\u escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _assets(names: Sequence[str]) -> str:
    return "\n".join(_asset(name) for name in names)


def _asset(name: str) -> str:
    return (resources.files("moestro.report") / "assets" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """The source expression of a content security policy for an inline element with this text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
