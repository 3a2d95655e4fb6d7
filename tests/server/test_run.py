"""How a server ends: what runs may finish, for a while, and a second signal is not waited for."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from live import Held, Live, MakeEngine, run_live

LONG = {"prompt": "the cat", "max_tokens": 400, "temperature": 0, "logit_bias": {"1": -100}}


@contextmanager
def one_request(
    make_engine: MakeEngine, tokenizer_path: Path, drain_seconds: float
) -> Iterator[tuple[Live, Held, Future[httpx.Response]]]:
    """A server, its engine held in the midst of a long request, and the answer to come."""
    with run_live(make_engine, tokenizer_path, drain_seconds=drain_seconds) as live, ThreadPoolExecutor(1) as clients:
        held = Held(live.engine.step, after=3)
        live.engine.step = held  # type: ignore[method-assign]
        reply = clients.submit(httpx.post, live.url + "/v1/completions", json=LONG, timeout=60)
        live.wait(held.reached.is_set)
        try:
            yield live, held, reply
        finally:
            held.release()


def test_what_runs_may_finish_and_new_requests_are_refused(make_engine: MakeEngine, tokenizer_path: Path) -> None:
    with one_request(make_engine, tokenizer_path, drain_seconds=1000) as (live, held, reply):
        assert live.http.get("/health").status_code == 200
        live.server.handle_exit(signal.SIGTERM, None)
        assert live.http.get("/health").status_code == 503
        refused = live.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "closing"
        held.release()
        assert reply.result().status_code == 200 and reply.result().json()["usage"]["completion_tokens"] == 400
        live.wait(lambda: live.server.should_exit)
        assert live.server.exit_signal is None


def test_draining_has_a_limit(make_engine: MakeEngine, tokenizer_path: Path) -> None:
    with one_request(make_engine, tokenizer_path, drain_seconds=0) as (live, held, reply):
        live.server.handle_exit(signal.SIGTERM, None)
        live.wait(lambda: live.server.should_exit)
        assert live.server.exit_signal == signal.SIGTERM
        held.release()
        assert reply.result().status_code == 503 and "shutting down" in reply.result().json()["error"]["message"]
        assert held.steps == 4  # the step under way was the last


def test_a_second_signal_ends_at_once(make_engine: MakeEngine, tokenizer_path: Path) -> None:
    with one_request(make_engine, tokenizer_path, drain_seconds=1000) as (live, held, reply):
        live.server.handle_exit(signal.SIGTERM, None)
        live.server.handle_exit(signal.SIGINT, None)
        assert isinstance(reply.exception(), httpx.TransportError) or reply.result().status_code == 500
        assert live.server.exit_signal == signal.SIGINT and held.steps == 3


def test_a_server_whose_engine_is_lost_ends_by_itself(make_engine: MakeEngine, tokenizer_path: Path) -> None:
    with run_live(make_engine, tokenizer_path) as live:
        live.service.worker._inbox.put("no command")  # type: ignore[arg-type]
        live.wait(lambda: live.server.should_exit)
        assert live.server.has_failed and live.server.exit_signal is None
