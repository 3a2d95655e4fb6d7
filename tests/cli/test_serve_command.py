"""`moestro serve`: as a process, the line when it is ready and how it ends; in ours, what it refuses to do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import Call
from starlette.testclient import TestClient

from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.machine import how_to_install
from moestro.model.transformer import Transformer, init_weights
from moestro.server import run
from moestro.server.app import create_app
from moestro.server.run import address_of
from moestro.server.service import Service
from moestro.training.checkpoint import write_model_directory

LONG = {
    "prompt": "the cat", "temperature": 0, "logit_bias": {"1": -100}, "stream": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip
SECONDS = 120  # what has not happened by then never does


@pytest.fixture(scope="module")
def model(make_config: Callable[..., Config], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Transformer(make_config("model.max_seq_len=16384").model)
    init_weights(model, 0)
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    write_model_directory(directory, model, tokenizer)
    return directory


@contextmanager
def serving(model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, which it prints when it is ready."""
    command = [sys.executable, "-m", "moestro", "serve", str(model), "--port", "0", "--memory", "64MiB", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Serving tiny at http://127.0.0.1:"), line + (
                process.stderr.read() if not line else ""
            )
            yield process, line.split()[-1].rstrip("/")
        finally:
            process.kill()


@contextmanager
def streaming(url: str, max_tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
    """The chunks of a request, which has begun to run with the first of them."""
    body = {**LONG, "max_tokens": max_tokens}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=SECONDS) as reply:
        yield (json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {"))


def test_sigterm_lets_running_requests_finish(model: Path) -> None:
    with serving(model, "--drain-seconds", "1000") as (process, url):
        assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "tiny"
        with streaming(url, max_tokens=400) as chunks:
            assert next(chunks)["choices"]
            process.send_signal(signal.SIGTERM)
            *_, last = chunks
        assert last["usage"]["completion_tokens"] == 400
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        said = dict(line.split(maxsplit=1) for line in process.stderr.read().splitlines())
    assert list(said) == ["model", "weights", "context", "cache", "drafts", "threads"]
    assert (said["model"], said["context"], said["drafts"]) == ("tiny", "16,384 tokens", "1 a step")


def test_a_context_can_be_limited(model: Path) -> None:
    with serving(model, "--max-context", "100") as (_, url):
        assert httpx.get(url + "/v1/models").json()["data"][0]["max_model_len"] == 100
        reply = httpx.post(f"{url}/v1/completions", json={"prompt": [5] * 90, "max_tokens": 20})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "context is 100 tokens" in error["message"] and "takes 16384" in error["message"]


def test_draining_has_a_limit(model: Path) -> None:
    """16,000 tokens take so long that they cannot be done before the limit."""
    with serving(model, "--drain-seconds", "0") as (process, url):
        with streaming(url, max_tokens=16_000) as chunks:
            assert next(chunks)["choices"]
            process.send_signal(signal.SIGTERM)
            *_, last = chunks
        assert "shutting down" in last["error"]["message"]
        assert process.wait(SECONDS) == 128 + signal.SIGTERM


def test_the_log_is_as_talkative_as_asked(model: Path) -> None:
    with serving(model, "--log-level", "info") as (process, url):
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "secret", "max_tokens": 1}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        *_, line = process.stderr.read().splitlines()
    assert "INFO moestro.access: POST /v1/completions 200, " in line and "secret" not in line


def test_a_key_is_asked_for(call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef"
    (tmp_path / "key").write_text(key + "\n")
    statuses = []

    def ask(service: Service, listener: socket.socket, key: str | None, drain_seconds: float) -> int:
        with TestClient(create_app(service, key=key), address_of(listener)) as client:
            statuses.append(client.get("/v1/models").status_code)
            statuses.append(client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code)
        service.close()
        return 0

    monkeypatch.setattr(run, "run_service", ask)
    options = ("--port", 0, "--memory", "64MiB", "--served-name", "tiny")
    code, out, err = call("serve", model, "--api-key-file", tmp_path / "key", *options)
    assert (code, out, err.split()[:2]) == (0, "", ["model", "tiny"])
    assert statuses == [401, 200]


Refused = Callable[..., str]


@pytest.fixture
def refused(call: Call) -> Refused:
    """`refused("--port", 1)` -> the one line of standard error, after exit code 2."""

    def run(*arguments: object) -> str:
        code, _, err = call("serve", *arguments)
        assert code == 2 and len(err.strip().splitlines()) == 1
        return err

    return run


def test_a_port_that_is_taken(refused: Refused, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in refused(model, "--port", port)
    assert "port 99999" in refused(model, "--port", 99999)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com"])
def test_addresses_that_others_can_reach_want_a_key(refused: Refused, model: Path, host: str) -> None:
    assert "--api-key-file" in refused(model, "--host", host)


def test_keys_and_models_that_cannot_be_used(refused: Refused, model: Path, tmp_path: Path) -> None:
    assert "cannot read the API key" in refused(model, "--api-key-file", tmp_path / "none")
    for text in ("short", "two words of sixteen", "schlüssel-schlüssel", "0123456789abcdef\nmore"):
        (tmp_path / "key").write_text(text)
        assert "must hold one key" in refused(model, "--api-key-file", tmp_path / "key")
    assert "does not exist" in refused(tmp_path / "none", "--port", 0)
    assert "memory" in refused(model, "--memory", "much", "--port", 0)
    assert "drain-seconds" in refused(model, "--drain-seconds", -1, "--port", 0)


def test_without_the_extra_one_line_says_what_to_install(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "moestro.server.run", raising=False)
    assert how_to_install("server") in refused(model)
