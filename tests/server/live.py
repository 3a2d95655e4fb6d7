"""A real server on loopback, in a thread of the tests' own process, and what tests want to know of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from moestro.engine.engine import Engine, Event
from moestro.server.app import WEB, create_app
from moestro.server.run import DrainingServer, address_of, bind
from moestro.server.service import Service

MakeEngine = Callable[..., Engine]
SECONDS = 60.0  # what has not happened by then never does


class Held:
    """An engine's `step` that stops before step number `after`, counted from 0, until it is released.

    Between `reached` and `release` a test does what must happen while the engine is busy, however long that takes.
    """

    def __init__(self, step: Callable[[], list[Event]], after: int) -> None:
        self.steps = 0
        self.reached = threading.Event()
        self._step, self._after, self._released = step, after, threading.Event()

    def __call__(self) -> list[Event]:
        if self.steps == self._after:
            self.reached.set()
            assert self._released.wait(SECONDS), "nobody released the engine"
        self.steps += 1
        return self._step()

    def release(self) -> None:
        """Let the step go on."""
        self._released.set()


class Live:
    """A running server: its address, its service, and a client for it."""

    def __init__(self, server: DrainingServer, service: Service, url: str, key: str | None) -> None:
        self.server, self.service, self.url = server, service, url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=SECONDS)

    @property
    def engine(self) -> Engine:
        return self.service.worker.engine

    def wait(self, is_done: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Until something is so; fails if it never is."""
        end = time.monotonic() + seconds
        while not is_done():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def is_idle(self) -> bool:
        """Nothing runs, and no page is held."""
        pool = self.engine.scheduler.pool
        return not self.engine.has_work and pool.num_available == pool.num_pages and not self.service.worker.num_choices


@contextmanager
def run_live(
    make: MakeEngine,
    tokenizer_path: Path,
    *,
    key: str | None = None,
    name: str = "tiny",
    web: Path = WEB,
    drain_seconds: float = 5.0,
) -> Iterator[Live]:
    """A server of its own for a test."""
    service = Service(make, tokenizer_path, name)
    listener = bind("127.0.0.1", 0)
    server = DrainingServer(create_app(service, key=key, web=web), service.worker, drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    live = Live(server, service, address_of(listener), key)
    thread.start()
    try:
        live.wait(lambda: server.started)
        yield live
    finally:
        live.http.close()
        server.should_exit = True
        thread.join()
        service.close()
        listener.close()
