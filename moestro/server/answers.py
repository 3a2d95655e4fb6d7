"""Turns events into HTTP answers, JSON objects or server-sent events; an answer ends when its client is gone."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from moestro.engine.events import Failure
from moestro.errors import ConfigError, MoestroError
from moestro.server.choices import Tree
from moestro.server.guard import error_tree
from moestro.server.log import note_hang_up, note_tokens
from moestro.server.metrics import Metrics
from moestro.server.responses import ResponseBuilder
from moestro.server.service import PreparedRequest, Service
from moestro.server.stream import DONE, PING, sse
from moestro.server.worker import ClosedError, EngineError, Stream

T = TypeVar("T")
PING_SECONDS = 15.0

log = logging.getLogger("moestro.server")


class ClientGoneError(Exception):
    """Nobody is waiting for the answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; if the client hangs up first, cancel it and raise ClientGoneError."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_end(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Timer:
    """Records when the tokens of a stream come, for the metrics."""

    def __init__(self, metrics: Metrics, prepared: PreparedRequest) -> None:
        self._metrics, self._begun = metrics, prepared.begun
        self._last: dict[int, float] = {}

    def add(self, index: int, reason: str | None) -> None:
        """Record a token of a choice, and why the choice ends if it does."""
        now = time.monotonic()
        if index in self._last:
            self._metrics.next_token.observe(now - self._last[index])
        else:
            self._metrics.first_token.observe(now - self._begun)
        self._last[index] = now
        if reason is not None:
            self._metrics.whole.observe(now - self._begun)
            self._metrics.success.labels(reason).inc()


async def answer(
    service: Service, prepared: PreparedRequest, http: HttpRequest, builder: ResponseBuilder | None = None
) -> Response:
    """Run a prepared request. Errors before the first byte are raised; later ones end the stream with an error.

    With a `builder` the answer is a response, else a completion.
    """
    stream = await service.worker.open(prepared.requests)
    if prepared.body.stream:
        return EventStream(service, prepared, stream, builder)
    try:
        tree = await while_connected(http.receive, collect(service, prepared, stream, builder))
    except ClientGoneError:
        service.metrics.aborted.inc()
        note_hang_up(http.scope)
        return Response(status_code=499)
    finally:
        stream.close()
        note_usage(http.scope, prepared)
    return JSONResponse(tree)


async def collect(
    service: Service, prepared: PreparedRequest, stream: Stream, builder: ResponseBuilder | None = None
) -> Tree:
    """The whole answer."""
    async for chunks in grow(service, prepared, stream):
        for chunk in chunks:
            if builder is not None:
                builder.push(chunk)
    if builder is not None:
        builder.finish(usage(prepared))
        return builder.tree()
    tree = head(service, prepared, prepared.kind)
    return {**tree, "choices": [choice.result() for choice in prepared.choices], "usage": usage(prepared)}


async def grow(service: Service, prepared: PreparedRequest, stream: Stream) -> AsyncIterator[list[Tree]]:
    """Feed events to the choices; yields the chunks of each step."""
    timer = Timer(service.metrics, prepared)
    async for events in stream:
        chunks = []
        for index, event in events:
            if event.finish_reason == "error":
                raise refusal(event.error)
            chunks += prepared.choices[index].push(event)
            timer.add(index, event.finish_reason)
        yield chunks


def refusal(failure: Failure | None) -> Exception:
    """The error for the client: its own mistakes in full; for engine failures, only that there was one."""
    if failure is not None and failure.kind in ("request", "grammar"):
        return ConfigError(failure.message)
    log.error("a request failed: %s", failure.message if failure else "unknown reason")
    return EngineError("the engine failed over this request")


def head(service: Service, prepared: PreparedRequest, kind: str) -> Tree:
    """The fields of an answer and of each chunk."""
    prefix = "cmpl" if prepared.kind == "text_completion" else "chatcmpl"
    return {"id": f"{prefix}-{prepared.id}", "object": kind, "created": prepared.created, "model": service.name}


def note_usage(scope: Scope, prepared: PreparedRequest) -> None:
    """Tell the log how many tokens were read and written."""
    note_tokens(scope, prepared.num_prompt_tokens, sum(choice.num_tokens for choice in prepared.choices))


def usage(prepared: PreparedRequest) -> Tree:
    """How many tokens were read and written."""
    written = sum(choice.num_tokens for choice in prepared.choices)
    return {
        "prompt_tokens": prepared.num_prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prepared.num_prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": prepared.num_cached},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.num_reasoning for choice in prepared.choices)},
    }


class EventStream(Response):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, prepared: PreparedRequest, stream: Stream, builder: ResponseBuilder | None = None
    ) -> None:
        self._service, self._prepared, self._stream, self._builder = service, prepared, stream, builder
        weakref.finalize(self, stream.close)  # in case nobody closes it
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientGoneError:
            self._service.metrics.aborted.inc()
            note_hang_up(scope)
        finally:
            self._stream.close()
            note_usage(scope, self._prepared)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in with_pings(self._response_events(self._builder) if self._builder else self._events()):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        prepared = self._prepared
        kind = "chat.completion.chunk" if prepared.kind == "chat.completion" else prepared.kind
        top = head(self._service, prepared, kind) | ({"usage": None} if prepared.body.wants_usage else {})
        for choice in prepared.choices:
            for chunk in choice.start():
                yield sse(chunk_tree(top, chunk))
        try:
            async for chunks in grow(self._service, prepared, self._stream):
                for chunk in chunks:
                    yield sse(chunk_tree(top, chunk))
            if prepared.body.wants_usage:
                yield sse({**top, "choices": [], "usage": usage(prepared)})
        except (EngineError, ClosedError, MoestroError) as error:
            kind = "invalid_request_error" if isinstance(error, MoestroError) else "server_error"
            yield sse(error_tree(str(error), kind))
        yield DONE

    async def _response_events(self, builder: ResponseBuilder) -> AsyncIterator[bytes]:
        for event in builder.start():
            yield sse(event, event["type"])
        try:
            async for chunks in grow(self._service, self._prepared, self._stream):
                for event in (event for chunk in chunks for event in builder.push(chunk)):
                    yield sse(event, event["type"])
            last = builder.finish(usage(self._prepared))
        except (EngineError, ClosedError, MoestroError) as error:
            last = builder.fail("invalid_prompt" if isinstance(error, MoestroError) else "server_error", str(error))
        for event in last:
            yield sse(event, event["type"])


def chunk_tree(top: Tree, chunk: Tree) -> Tree:
    """A chunk of one choice; the extension field goes beside the choices."""
    details = {"moestro": chunk.pop("moestro")} if "moestro" in chunk else {}
    return {**top, "choices": [chunk], **details}


async def with_pings(events: AsyncIterator[bytes], seconds: float = PING_SECONDS) -> AsyncIterator[bytes]:
    """The events, with a comment whenever none has come for a while, so that proxies keep the connection."""
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events, b""))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield PING
                continue
            data, waiting = waiting.result(), None
            if not data:
                return
            yield data
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
