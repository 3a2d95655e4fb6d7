"""The log on stderr: a line for every request, errors with their tracebacks. Never a prompt, an answer or a key.

2026-11-28 09:00:00,000 INFO moestro.access: POST /v1/chat/completions 200, 17 + 32 tokens, 0.84 s
"""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
PROBES = ("/health", "/metrics")  # asked again and again: told only at "debug"
RECORD = "moestro.record"  # a dict in the scope of a request: what its line says besides status and time
MAX_PATH = 200

access = logging.getLogger("moestro.access")


def configure_logging(level: str) -> None:
    """Write what Moestro logs from a level of `LEVELS` on, and the warnings of others, to stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("moestro").setLevel(LEVELS[level])


def note_tokens(scope: Scope, num_prompt: int, num_written: int) -> None:
    """Have a request's line say how many tokens it read and wrote."""
    scope.get(RECORD, {})["tokens"] = f"{num_prompt} + {num_written} tokens"


def note_hang_up(scope: Scope) -> None:
    """Have a request's line say that its client hung up."""
    scope.get(RECORD, {})["end"] = "the client hung up"


class AccessLog:
    """ASGI middleware: a line for every request once it is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, record = time.monotonic(), dict[str, Any](status="no answer")
        scope[RECORD] = record

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            self._write(scope, record, time.monotonic() - begun)

    @staticmethod
    def _write(scope: Scope, record: dict[str, Any], seconds: float) -> None:
        is_probe = scope["path"] in PROBES and record["status"] == 200
        parts = [str(record["status"]), *(record[name] for name in ("tokens", "end") if name in record)]
        path = ascii(scope["path"])[1:-1][:MAX_PATH]  # a stranger wrote it: nothing of it may move the cursor
        level = logging.DEBUG if is_probe else logging.INFO
        access.log(level, "%s %s %s, %.2f s", scope["method"], path, ", ".join(parts), seconds)
