"""The Jinja of chat templates: what transformers gives them, in a sandbox, with bounds.

Filters, globals and the tags `{% generation %}`, `{% break %}` and `{% continue %}` are those of `apply_chat_template`.
Whatever makes a large string out of a small program is bounded: repetition, padding, formatting, powers, nested loops.
Concatenation in a loop is not; a process with a limit on memory and time bounds that (`server/renderer.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import soft_str

from moestro.errors import DataError

MAX_TEMPLATE_CHARS = 128 * 1024
MAX_LOOP_DEPTH = 4
MAX_REPEATED = 1 << 16  # characters or items that one repetition may make
MAX_WIDTH = 1024  # to which one value may be padded
MAX_BITS = 256  # of a whole number
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\*|\d{4})|\{[^{}]*:[^{}]*\d{4}")  # printf's or str.format's
_PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})  # methods of strings that pad


@lru_cache(maxsize=8)
def compile_template(template: str) -> jinja2.Template:
    """The program of a template. DataError if it is not Jinja, or too large."""
    if len(template) > MAX_TEMPLATE_CHARS:
        raise DataError(f"chat template: longer than {MAX_TEMPLATE_CHARS} characters")
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationTag],
        autoescape=False,
    )
    environment.filters |= {
        "tojson": to_json,
        "center": _bounded("center"),
        "indent": _bounded("indent"),
        "wordwrap": _bounded("wordwrap"),
        "format": lambda value, *args, **kwargs: _check_format(value) % (kwargs or args),
    }
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        if _measure_loops(environment.parse(template)) > MAX_LOOP_DEPTH:
            raise DataError(f"chat template: loops nested deeper than {MAX_LOOP_DEPTH}")
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise DataError(f"chat template: {clean_text(error)}") from error


def clean_text(error: object) -> str:
    """What an error says, on one line that a terminal can show: the words may be the template's or a message's."""
    text = " ".join(str(error).split())[:500]
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant wrote, for training; here it is only shown."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a set, which others could change

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, as a block of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Macro) -> str:
        return caller()


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, without what turns a short template into gigabytes."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products and powers of bounded size, repetition of bounded length, formatting to bounded widths."""
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "%" or isinstance(left, float) or isinstance(right, float):
            pass  # arithmetic that cannot grow
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"operator '{operator}' is bounded to numbers of {MAX_BITS} bits")
        elif operator == "*":
            items, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(count, int) and len(items) * count > MAX_REPEATED:
                raise SecurityError(f"repetition is bounded to {MAX_REPEATED} characters or items")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in jinja2, for arguments of these names
        """Call what a template calls; methods that pad may pad to a bounded width."""
        if isinstance(getattr(__obj, "__self__", None), str) and __obj.__name__ in _PADDING:
            _check_widths(__obj.__name__, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandboxed `str.format`, for formats of bounded width; None for anything else."""
        if (wrapped := super().wrap_str_format(value)) is not None:
            _check_format(value.__self__, nested=re.compile(r"\{[^{}]*\{"))
        return wrapped


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: without HTML escapes, with the arguments of `json.dumps`."""
    _check_widths("tojson", indent, *map(len, separators or ()))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded(name: str) -> Callable[..., Any]:
    """Jinja's filter of that name, for bounded widths."""
    plain = FILTERS[name]

    @jinja2.pass_environment
    def call(environment: jinja2.Environment, value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_widths(name, *args, *kwargs.values())
        return plain(environment, value, *args, **kwargs) if name == "wordwrap" else plain(value, *args, **kwargs)

    return call


def _check_widths(name: str, *values: Any) -> None:
    for value in values:
        size = len(value) if isinstance(value, str) else value
        if isinstance(size, int) and size > MAX_WIDTH:
            raise SecurityError(f"{name} is bounded to a width of {MAX_WIDTH}")


def _check_format(text: Any, nested: re.Pattern[str] | None = None) -> str:
    text = soft_str(text)
    if _WIDE_FORMAT.search(text) or (nested is not None and nested.search(text.replace("{{", ""))):
        raise SecurityError("formatting is bounded to widths below 1000 that the format itself gives")
    return text


def _measure_loops(node: nodes.Node) -> int:
    depth = max((_measure_loops(child) for child in node.iter_child_nodes()), default=0)
    return depth + isinstance(node, nodes.For)


def _strftime_now(format: str) -> str:
    _check_widths("strftime_now", format)
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
