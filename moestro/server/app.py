"""The routes. Each one reads a body, has the service prepare it, and answers; errors become OpenAI's error objects."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from moestro.engine.conversation import REPLY_TOKENS, TEXT_TOKENS, USUAL, is_base_model
from moestro.engine.scheduler import QueueFullError
from moestro.errors import MoestroError
from moestro.server.answers import ClientGoneError, answer, while_connected
from moestro.server.body import BodyRoute, describe_error
from moestro.server.docs_page import STYLE, render_docs
from moestro.server.guard import Guard, error_tree
from moestro.server.loads import SAMPLE_SECONDS
from moestro.server.log import AccessLog
from moestro.server.responses import ResponseBuilder, ResponsesRequest
from moestro.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, ErrorBody, TokenizeRequest
from moestro.server.service import DEFAULTS, ContextLengthError, Service, UnknownModelError
from moestro.server.traces import TraceRequest, Tracing
from moestro.server.worker import ClosedError, EngineError
from moestro.version import __version__

WEB = Path(__file__).with_name("web")
RETRY_SECONDS = 1
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

log = logging.getLogger("moestro.server")


def create_app(service: Service, *, key: str | None = None, web: Path = WEB) -> FastAPI:
    """The application. With a `key`, every route but `/health` and the chat page requires it as a bearer token."""

    @asynccontextmanager
    async def sample_loads(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.ensure_future(_sample_loads(service))
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    app = FastAPI(
        title="Moestro",
        version=__version__,
        docs_url=None,  # both pages load scripts from elsewhere; `docs_page.py` makes another
        redoc_url=None,
        lifespan=sample_loads,
        responses=ERRORS,
    )
    app.router.route_class = BodyRoute
    app.add_middleware(Guard, key=key)
    app.add_middleware(AccessLog)
    _add_error_handlers(app, service)
    _add_completions(app, service)
    _add_token_routes(app, service)
    _add_trace(app, service)
    _add_status(app, service)
    _add_page(app, web)
    return app


async def _sample_loads(service: Service) -> None:
    """Sample loads so that `/routing` can report recent ones, however seldom it is asked. Logs errors and goes on."""
    while service.worker.is_alive:
        try:
            service.loads.add(time.monotonic(), (await service.worker.read_stats()).loads.numpy())
        except ClosedError:
            return
        except Exception:
            log.exception("the experts' loads could not be sampled")
        await asyncio.sleep(SAMPLE_SECONDS)


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, http: Request) -> Response:
        """Continue a text, several, or token ids."""
        return await answer(service, await service.prepare_text(body), http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        """Answer a conversation; tools, thoughts, structured output."""
        return await answer(service, await service.prepare_chat(body), http)

    @app.post("/v1/responses")
    async def respond(body: ResponsesRequest, http: Request) -> Response:
        """The same as items: OpenAI's newer API, without anything kept between requests."""
        prepared = await service.prepare_chat(body.chat)
        return await answer(service, prepared, http, ResponseBuilder(body, prepared.id, prepared.created, service.name))

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_describe_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """The model, or 404 for any other name."""
        service.check_model(name)
        return _describe_model(service)


def _describe_model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "moestro",
        "max_model_len": service.context,
        "defaults": DEFAULTS | service.defaults.choose(),  # an extension: what holds where a request gives no value
        "base": is_base_model(service.tokenizer),  # an extension: it continues texts
        # an extension: how our page and command line write with it
        "usual": {"reply_tokens": REPLY_TOKENS, "text_tokens": TEXT_TOKENS, **USUAL, **service.defaults.choose()},
    }


def _add_token_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """A text or messages as token ids, as the other routes would read them."""
        ids = await service.tokenize(body)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """Token ids as text."""
        text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, skip_special=False)
        return {"prompt": text}


def _add_trace(app: FastAPI, service: Service) -> None:
    tracing = Tracing(service)

    @app.post("/trace")
    async def trace(body: TraceRequest, http: Request) -> Response:
        """For each of these tokens: its experts and their weights, its probability, rank and alternatives."""
        try:
            return JSONResponse(await while_connected(http.receive, tracing.trace(body)))
        except ClientGoneError:
            return Response(status_code=499)


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while requests are welcome, else 503."""
        is_well = service.worker.is_alive and not service.worker.is_closed
        return JSONResponse({"status": "ok" if is_well else "closing"}, 200 if is_well else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of the server."""
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        text = service.metrics.render(await service.worker.read_stats())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/routing")
    async def routing() -> dict[str, Any]:
        """How often each expert was chosen, since the start and lately."""
        stats = await service.worker.read_stats()
        return service.loads.describe(time.monotonic(), stats.loads.numpy())


def _add_page(app: FastAPI, web: Path) -> None:
    page = web / "index.html"

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        if page.is_file():
            return FileResponse(page)
        return PlainTextResponse("Moestro serves an OpenAI-compatible API under /v1; this install has no chat page.\n")

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> Response:
        return HTMLResponse(render_docs(app.openapi()))

    @app.get("/docs.css", include_in_schema=False)
    async def show_style() -> Response:
        return Response(STYLE, media_type="text/css")

    if web.is_dir():
        app.mount("/web", StaticFiles(directory=web))


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        place, text = describe_error(error)
        return JSONResponse(error_tree(f"{place}: {text}" if place else text, "invalid_request_error", place), 400)

    @app.exception_handler(MoestroError)
    async def refused(_: Request, error: MoestroError) -> Response:
        if isinstance(error, QueueFullError):
            service.metrics.rejected.labels("queue_full").inc()
            tree = error_tree(str(error), "rate_limit_error", code="queue_full")
            return JSONResponse(tree, 429, {"Retry-After": str(RETRY_SECONDS)})
        if isinstance(error, UnknownModelError):
            service.metrics.rejected.labels("model_not_found").inc()
            return JSONResponse(error_tree(str(error), "invalid_request_error", "model", "model_not_found"), 404)
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        service.metrics.rejected.labels(code or "invalid").inc()
        return JSONResponse(error_tree(str(error), "invalid_request_error", code=code), 400)

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> Response:
        return JSONResponse(error_tree(str(error), "server_error", code="closing"), 503, {"Retry-After": "5"})

    @app.exception_handler(EngineError)
    async def failed(_: Request, error: EngineError) -> Response:
        return JSONResponse(error_tree(str(error), "server_error"), 500)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return JSONResponse(error_tree(str(error.detail), "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        return JSONResponse(error_tree("the server failed over this request", "server_error"), 500)
