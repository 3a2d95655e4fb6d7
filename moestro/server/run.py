"""The server's process: its socket, its signals, its shutdown.

After the first SIGTERM or SIGINT running requests may finish: new ones get 503, and after `drain_seconds` the rest end
with an error. The second signal ends everything at once.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from moestro.errors import ConfigError
from moestro.server.app import create_app
from moestro.server.schema import MAX_HEADER_BYTES
from moestro.server.service import Service
from moestro.server.worker import EngineWorker

MIN_KEY_CHARS = 16
LAST_SECONDS = 5  # for answers under way once the engine has stopped


def read_key(path: Path | None) -> str | None:
    """The key in a file. ConfigError if it is missing, short, or not a single line of printable ASCII."""
    if path is None:
        return None
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the API key from {path}: {error}") from error
    if len(key) < MIN_KEY_CHARS or not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{path} must hold one key of at least {MIN_KEY_CHARS} printable characters without spaces")
    return key


def check_host(host: str, has_key: bool) -> None:
    """Raise ConfigError for an address that others can reach if there is no key."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback and not has_key:
        raise ConfigError(
            f"{host} can be reached by others, so it needs a key", hint="give --api-key-file, or stay on 127.0.0.1"
        )


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, which refuses clients until the server listens; port 0 takes a free one.

    ConfigError if the address is taken or is not valid.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The address at which clients reach a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_service(service: Service, listener: socket.socket, key: str | None, drain_seconds: float) -> int:
    """Serve until a signal; returns the process's exit code: 0 if everything under way could finish, 1 if the engine
    failed beyond repair.
    """

    def announce() -> None:
        print(f"Serving {service.name} at {address_of(listener)}/", flush=True)

    try:
        server = DrainingServer(create_app(service, key=key), service.worker, drain_seconds, announce)
        server.run(sockets=[listener])
    finally:
        service.close()
    if server.has_failed:
        return 1
    return 0 if server.exit_signal is None else 128 + server.exit_signal


class DrainingServer(uvicorn.Server):
    """Shuts down in two steps, and by itself if the engine's thread has ended: whoever started it can start it again.

    `exit_signal` is the signal that cut it short, if one did; `has_failed`: the engine did.
    """

    def __init__(
        self, app: FastAPI, worker: EngineWorker, drain_seconds: float, when_ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                log_config=None,  # what it logs goes where all else goes
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )
        self.exit_signal: int | None = None
        self.has_failed = False
        self._worker, self._drain_seconds, self._when_ready = worker, drain_seconds, when_ready
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and report when requests are welcome."""
        await super().startup(sockets)
        if self._when_ready is not None and self.started:
            self._when_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        if self._deadline is None:
            self._worker.is_closed = True
            self._deadline = time.monotonic() + self._drain_seconds
        else:
            self.exit_signal = sig
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; called ten times a second."""
        if self._deadline is None and not self._worker.is_alive:
            self.has_failed = self.should_exit = True
        if self._deadline is not None and not self.should_exit:
            is_late = time.monotonic() > self._deadline
            if is_late:
                self.exit_signal = signal.SIGTERM
                self._worker.abandon()
            self.should_exit = is_late or not self._worker.num_choices
        return await super().on_tick(counter)
