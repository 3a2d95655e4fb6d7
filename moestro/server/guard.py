"""Checks before every route: size of headers and body, time to send them, the key, and the host name used.

No part of a body is read before the key is checked. Without a key the server answers only to loopback names, so that a
web page elsewhere cannot reach it through its own name that resolves to 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro.server.schema import MAX_BODY_BYTES, MAX_HEADER_BYTES, MAX_HEADERS

OPEN_PATHS = ("/", "/health")
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
BODY_SECONDS = 60.0
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def is_page(path: str) -> bool:
    """Whether a path belongs to the chat page, its assets or the page of routes: the same for every model."""
    return path in ("/", "/docs", "/docs.css") or path.startswith("/web/")


def error_tree(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware; with `key` None no key is required."""

    def __init__(self, app: ASGIApp, key: str | None = None, body_seconds: float = BODY_SECONDS) -> None:
        self.app, self.body_seconds = app, body_seconds
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, _with_headers(scope["path"], send))
            return
        if scope["method"] == "HEAD":  # answered as GET is; the server then sends no body
            scope = {**scope, "method": "GET"}
        await self.app(scope, _Body(receive, self.body_seconds), _with_headers(scope["path"], send))

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            text = f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"
            return JSONResponse(error_tree(text, "invalid_request_error"), 431)
        found = dict(headers)
        if not self._is_authorised(scope["path"], found):
            tree = error_tree("missing or wrong API key", "authentication_error", code="invalid_api_key")
            return JSONResponse(tree, 401, {"WWW-Authenticate": "Bearer"})
        host = found.get(b"host", b"").decode("latin-1")
        if self._digest is None and not LOOPBACK.fullmatch(host):
            text = "without a key this server answers to localhost only"
            return JSONResponse(error_tree(text, "permission_error"), 403)
        length = found.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            return JSONResponse(error_tree(_too_long(), "invalid_request_error"), 413, {"Connection": "close"})
        return None

    def _is_authorised(self, path: str, headers: dict[bytes, bytes]) -> bool:
        """Whether a request may pass. Compares equally long digests in constant time, so not even its length leaks."""
        if self._digest is None or path in OPEN_PATHS or is_page(path):
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(given, self._digest) and scheme.lower() == b"bearer"


class _Body:
    """`receive` with a bound on bytes and, until the body is complete, on time."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive, self._seconds = receive, seconds
        self._size = 0
        self._is_whole = False

    async def __call__(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._seconds)
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {self._seconds:g} seconds") from None
        self._size += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._size > MAX_BODY_BYTES:
            raise HTTPException(413, _too_long())
        return message


def _too_long() -> str:
    return f"the body is longer than {MAX_BODY_BYTES} bytes"


def _with_headers(path: str, send: Send) -> Send:
    added = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
    if is_page(path):
        added.append((b"content-security-policy", CONTENT_POLICY.encode()))
        added.append((b"cache-control", b"no-cache"))  # after an upgrade, old modules must not mix with new ones

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *added]
        await send(message)

    return wrapped
