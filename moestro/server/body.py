"""Reads the JSON body of a request, and says where it is wrong: by line and column, or by the path of a field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from moestro.server.fields import FieldError

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # may be half of a pair
MAX_PATH, MAX_REASON = 256, 1024


class BodyRequest(Request):
    """A request whose body is text in UTF-8 and JSON by the letter, or else a 400 that says where it is not."""

    async def json(self) -> Any:
        """The body's tree; every string in it can be written as UTF-8."""
        body = await self.body()
        try:
            tree = json.loads(body.decode(), parse_constant=refuse_constant)
        except UnicodeDecodeError as error:
            raise HTTPException(400, f"the body is not UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise HTTPException(400, f"the body is not JSON at {place}: {error.msg}") from None
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None
        if _HALF.search(body):
            check_text(tree)
        return tree


class BodyRoute(APIRoute):
    """A route that reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's handler, with another kind of request."""
        handle = super().get_route_handler()

        async def handle_body(request: Request) -> Response:
            response: Response = await handle(BodyRequest(request.scope, request.receive))
            return response

        return handle_body


def refuse_constant(name: str) -> NoReturn:
    """ValueError for a number that Python reads and JSON does not know."""
    raise ValueError(f"{name} is no number of JSON")


def check_text(tree: Any) -> None:
    """HTTPException for a string with half of a surrogate pair, which is no Unicode text. No recursion."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), tree)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, str) and not is_text(node):
            raise HTTPException(400, f"{spell_path(path)}: half of a surrogate pair is no Unicode text")
        if isinstance(node, dict):
            waiting += [(path, key) for key in node] + [((*path, key), child) for key, child in node.items()]
        elif isinstance(node, list):
            waiting += [((*path, index), child) for index, child in enumerate(node)]


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def spell_path(path: Sequence[str | int]) -> str:
    """`messages[2].content[0].type`; the whole body is `body`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    text = "".join(parts).removeprefix(".")[:MAX_PATH]
    return text.encode("utf-8", "replace").decode() or "body"


def describe_error(error: RequestValidationError) -> tuple[str | None, str]:
    """The path of the field at fault, None for the whole body, and what is wrong with it.

    Reports the most deeply nested error: it says most.
    """
    found = max(error.errors(), key=lambda entry: len(entry["loc"]))
    path = list(_path_in(error.body, found["loc"][1:]))
    cause = found.get("ctx", {}).get("error")
    path += [cause.field] if isinstance(cause, FieldError) else []
    reason = str(found["msg"]).removeprefix("Value error, ")[:MAX_REASON]
    return spell_path(path) if path else None, reason


def _path_in(body: Any, place: Sequence[str | int]) -> Iterator[str | int]:
    """The parts of a validator's location that are in the body; others name types. The last may be missing."""
    for index, part in enumerate(place):
        is_item = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_item or (isinstance(body, dict) and part in body):
            yield part
            body = body[part]
        elif index == len(place) - 1 and isinstance(body, dict) and re.fullmatch("[a-z][a-z0-9_]*", str(part)):
            yield part
