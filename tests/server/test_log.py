"""What the log says of requests: one line each, and nothing of what was said."""

from __future__ import annotations

import logging
import re
import socket

import pytest
from live import Held, Live

from moestro.server.log import access, configure_logging

SECRET = "a secret that nobody may read"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "moestro.access")
    return caplog


def written(lines: pytest.LogCaptureFixture, live: Live, count: int) -> list[str]:
    """The first lines of the log; a line is written after its answer, so it may have to be waited for."""
    live.wait(lambda: len(lines.messages) >= count)
    return lines.messages


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_with_tokens_and_seconds(
    live: Live, lines: pytest.LogCaptureFixture, stream: bool
) -> None:
    body = {"prompt": SECRET, "max_tokens": 3, "stream": stream, "user": SECRET}
    assert live.http.post("/v1/completions?key=secret", json=body).status_code == 200
    count = live.http.post("/tokenize", json={"prompt": SECRET}).json()["count"]
    first, second = written(lines, live, 2)
    assert first.startswith(f"POST /v1/completions 200, {count} + 3 tokens, ") and first.endswith(" s")
    assert second.startswith("POST /tokenize 200, ") and "secret" not in lines.text


def test_errors_strangers_and_probes(live: Live, lines: pytest.LogCaptureFixture) -> None:
    live.http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": -1})
    live.http.get("/none%0a%1b[31mred")
    live.http.get("/health")
    found = written(lines, live, 3)
    assert found[0].startswith("POST /v1/completions 400, ") and "secret" not in lines.text
    assert r"GET /none\n\x1b[31mred 404, " in found[1]
    assert [record.levelname for record in lines.records] == ["INFO", "INFO", "DEBUG"]


def test_a_client_that_hangs_up_is_told_apart(
    live: Live, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(live.engine.step, after=2)
    monkeypatch.setattr(live.engine, "step", held)
    host, port = live.url.removeprefix("http://").split(":")
    body = b'{"prompt": "x", "max_tokens": 500, "stream": true}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    head += f"\r\nContent-Length: {len(body)}"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        assert b" 200 " in connection.makefile("rb").readline()
        live.wait(held.reached.is_set)
    (line,) = written(lines, live, 1)
    held.release()
    assert re.match(r"POST /v1/completions 200, 2 \+ [0-4] tokens, the client hung up, ", line)
    live.wait(live.is_idle)


def test_levels_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    package = logging.getLogger("moestro")
    monkeypatch.setattr(package, "level", package.level)
    for level, shows in (("warning", False), ("info", True)):
        configure_logging(level)
        access.manager._clear_cache()  # type: ignore[attr-defined]
        assert access.isEnabledFor(logging.INFO) == shows
