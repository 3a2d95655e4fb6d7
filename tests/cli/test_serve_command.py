"""`moestro serve` as a process: the line when it is ready, what it refuses to do, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from command_line import Call

from moestro.cli.serve import parse_bytes
from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.errors import ConfigError
from moestro.model.transformer import Transformer, init_weights
from moestro.training.checkpoint import write_model_directory

LONG = {"prompt": "the cat", "max_tokens": 400, "temperature": 0, "logit_bias": {"1": -100}}


@pytest.fixture(scope="module")
def model(make_config: Callable[..., Config], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Transformer(make_config("model.max_seq_len=512").model, torch.float32)
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
            yield process, line.split()[-1]
        finally:
            process.kill()


def ask(url: str, into: list[httpx.Response]) -> threading.Thread:
    """A long request under way in a thread."""
    thread = threading.Thread(target=lambda: into.append(httpx.post(url + "/v1/completions", json=LONG, timeout=90)))
    thread.start()
    for _ in range(500):
        if "num_requests_running 1.0" in httpx.get(url + "/metrics").text:
            return thread
        time.sleep(0.01)
    pytest.fail("the request does not run")


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(model: Path) -> None:
    replies: list[httpx.Response] = []
    with serving(model, "--drain-seconds", "120") as (process, url):
        assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "tiny"
        thread = ask(url, replies)
        process.send_signal(signal.SIGTERM)
        for _ in range(100):
            if httpx.get(url + "/health").status_code != 200:
                break
            time.sleep(0.01)
        refused = httpx.post(url + "/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "closing"
        thread.join()
        assert process.wait(60) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    assert replies[0].status_code == 200 and replies[0].json()["usage"]["completion_tokens"] == 400


def test_draining_has_a_limit_and_a_second_signal_ends_at_once(model: Path) -> None:
    replies: list[httpx.Response] = []
    with serving(model, "--drain-seconds", "0.1") as (process, url):
        thread = ask(url, replies)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert replies[0].status_code == 503 and "shutting down" in replies[0].json()["error"]["message"]


def test_a_key_is_asked_for(model: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    with serving(model, "--api-key-file", str(key), "--served-name", "tiny") as (_, url):
        assert httpx.get(url + "/v1/models").status_code == 401
        headers = {"Authorization": "Bearer 0123456789abcdef"}
        assert httpx.get(url + "/v1/models", headers=headers).status_code == 200


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
    assert "pip install 'moestro[server]'" in refused(model)


def test_sizes() -> None:
    sizes = {"4GiB": 4 * 2**30, "512 MiB": 2**29, "1.5G": 3 * 2**29, "1000": 1000, "7B": 7, "2K": 2048, None: None}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "-1", "0", "4GB", "4 GiB GiB", "nan", "1e9"):
        with pytest.raises(ConfigError, match="4GiB"):
            parse_bytes(text)
