"""What a server on a network must stand: bounds, keys, hang-ups, forgeries, engines that raise. Each has a test."""

from __future__ import annotations

import hmac
import itertools
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import torch
from live import Held, Live, MakeEngine, run_live

from moestro.data.tokenizer import Tokenizer
from moestro.engine.events import Event, Failure
from moestro.errors import ConfigError
from moestro.server import guard
from moestro.server.answers import refusal
from moestro.server.schema import MAX_BODY_BYTES, MAX_HEADERS, MAX_SCHEMA_DEPTH
from moestro.server.worker import EngineError

KEY = "a-key-of-sixteen-characters-or-more"
TALK = [{"role": "user", "content": "the cat"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
LONG = {"prompt": "the cat", "max_tokens": 900, "temperature": 0, "logit_bias": {"1": -100}}


def nest(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(depth):
        tree = {"not": tree}
    return tree


def schema(tree: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": tree}}}


@pytest.fixture(scope="module")
def guarded(make_engine: MakeEngine, tokenizer_path: Path) -> Iterator[Live]:
    with run_live(make_engine, tokenizer_path, key=KEY) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1024}, "context"),
        ({"temperature": 1e999}, "temperature"),
        ({"logit_bias": {str(id): 1 for id in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"900": 1}}, "vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": TALK * 4097}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "type",
        ),
        ({"messages": [{"role": "user", "content": "the cat " * 9000}]}, "context"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, "context"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [{**TOOL, "function": {"name": "f", "description": "x" * 40_000}}] * 2}, "tools"),
        ({"tools": [{**TOOL, "function": {"name": "f f"}}]}, "name"),
        ({"tools": [{**TOOL, "function": {"name": "f", "parameters": nest(40)}}]}, "nested"),
        ({"tool_choice": "required"}, "tool"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool"),
        (schema(nest(MAX_SCHEMA_DEPTH)), "nested"),
        (schema({"enum": list(range(5000))}), "4096"),
        (schema({"const": "x" * 70_000}), "65536"),
        (schema({"const": "\ud83d"}), "schema"),
        (schema({"type": "no such type"}), "grammar"),
        (schema({"$ref": "http://127.0.0.1:1/x.json"}), "grammar"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"structured_outputs": {"regex": "(" * 50}}, "grammar"),
        ({"structured_outputs": {"regex": "x" * 20_000}}, "regex"),
        ({"structured_outputs": {"regex": "a{1000}{1000}{1000}"}}, "grammar"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "one"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "one"),
    ],
)
def test_what_is_out_of_bounds_is_a_400_that_says_so(live: Live, body: dict[str, Any], named: str) -> None:
    text = json.dumps({"messages": TALK, **body}).replace("Infinity", "1e999")
    reply = live.http.post("/v1/chat/completions", content=text, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert named in error["message"] and error["type"] == "invalid_request_error" and len(error["message"]) < 2000
    assert live.is_idle()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompt": [["x"]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "vocabulary"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1] * 1025}, "context"),
        ({"prompt": ["x"] * 65, "n": 2}, "128"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "seed": 2**63}, "seed"),
        ({}, "prompt"),
    ],
)
def test_completions_are_bounded_too(live: Live, body: dict[str, Any], named: str) -> None:
    reply = live.http.post("/v1/completions", json=body)
    assert reply.status_code == 400 and named in reply.json()["error"]["message"], reply.text
    assert live.is_idle()


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 200_000, b'{"prompt": ' + b"9" * 5000 + b"}", b"\xff", b"null"])
def test_bodies_that_are_no_json_object_are_a_400(live: Live, body: bytes) -> None:
    reply = live.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_forms_of_other_sites_are_not_read_as_json(live: Live) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        assert live.http.post("/v1/completions", content=body, headers=headers).status_code == 400
    assert "access-control-allow-origin" not in live.http.get("/health", headers={"Origin": "http://x"}).headers


def send_raw(live: Live, data: bytes) -> bytes:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(data)
            return connection.makefile("rb").readline()
        except ConnectionError:
            return b""


def test_long_bodies_are_refused_before_they_are_read(live: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    for length in (str(MAX_BODY_BYTES + 1), "9" * 19):
        assert b" 413 " in send_raw(live, head + f"Content-Length: {length}\r\n\r\n".encode())

    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**16 + 2):
            yield b" " * 2**16

    reply = live.http.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413 and "4194304" in reply.json()["error"]["message"]


def test_many_and_long_headers_are_refused(live: Live) -> None:
    assert live.http.get("/health", headers={f"x-{n}": "y" for n in range(MAX_HEADERS)}).status_code == 431
    assert live.http.get("/health", headers={"x": "y" * 33_000}).status_code == 431
    assert b" 400 " in send_raw(live, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nx: " + b"y" * 10**6)
    assert live.http.get("/health").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(
    make_engine: MakeEngine, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard.Guard.__init__, "__defaults__", (None, 0.2))
    with run_live(make_engine, tokenizer_path) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: 9\r\n\r\n{")
            assert b" 408 " in connection.makefile("rb").readline()


def test_every_route_but_health_and_the_page_wants_the_key(guarded: Live) -> None:
    paths = guarded.http.get("/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    assert {"/v1/chat/completions", "/metrics", "/routing", "/tokenize", "/version", "/health"} <= paths.keys()
    wrong = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"X-Api-Key": KEY})
    others = [("get", "/openapi.json"), ("get", "/none"), ("post", "/webx"), ("get", "/health/x")]
    with httpx.Client(base_url=guarded.url) as stranger:
        for (method, path), headers in itertools.product([*routes, *others], wrong):
            reply = stranger.request(method, path, headers=headers)
            if path == "/health":
                assert reply.status_code == 200
            else:
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key", path
        assert stranger.get("/").status_code == 200
    assert guarded.http.get("/version").status_code == 200


def test_keys_are_compared_in_constant_time(guarded: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def recording(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(guard.hmac, "compare_digest", recording)
    assert httpx.get(guarded.url + "/version", headers={"Authorization": "Bearer x"}).status_code == 401
    ((given, known),) = seen
    assert len(given) == len(known) == 32 and given != known


def test_without_a_key_only_loopback_names_are_answered(live: Live, guarded: Live) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"):
        reply = live.http.get("/version", headers={"Host": host})
        assert reply.status_code == 403, host
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "LocalHost:80", "LOCALHOST"):
        assert live.http.get("/version", headers={"Host": host}).status_code == 200, host
    assert guarded.http.get("/version", headers={"Host": "my.proxy"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_hangs_up_is_dropped_within_a_step(
    live: Live, stream: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(live.engine.step, after=3)
    monkeypatch.setattr(live.engine, "step", held)
    aborted = live.service.metrics.aborted._value.get()
    body = json.dumps({**LONG, "messages": TALK, "stream": stream, "n": 2}).encode()
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        live.wait(held.reached.is_set)
    live.wait(lambda: not live.service.worker.num_choices)  # the event loop has been told
    held.release()
    live.wait(live.is_idle)
    assert held.steps == 4  # the step under way is the last, of 900
    assert live.service.metrics.aborted._value.get() == aborted + 1


def test_a_full_queue_is_a_429_with_a_time_to_come_back(make_engine: MakeEngine, tokenizer_path: Path) -> None:
    def make() -> Any:
        return make_engine(max_running=2, max_waiting=2)

    with run_live(make, tokenizer_path) as running, httpx.Client(base_url=running.url, timeout=60) as other:
        with other.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 400, "n": 2, "stream": True}) as busy:
            lines = busy.iter_lines()  # kept: what is collected hangs up
            next(lines)
            for body in ({"prompt": "x", "n": 3}, {"prompt": ["x"] * 3}):
                reply = running.http.post("/v1/completions", json=body)
                assert reply.status_code == 429 and int(reply.headers["Retry-After"]) >= 1
                assert reply.json()["error"]["type"] == "rate_limit_error"
            assert running.http.get("/health").status_code == 200
            assert running.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        running.wait(running.is_idle)
        assert running.http.post("/v1/completions", json={"prompt": ["x"] * 3, "max_tokens": 1}).status_code == 429
        assert running.http.post("/v1/completions", json={"prompt": "x", "n": 2, "max_tokens": 1}).status_code == 200


def test_a_request_that_makes_the_engine_raise_fails_alone(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = live.engine.step

    def raising() -> list[Event]:
        if any(s.params.seed == 666 and s.generated for s in live.engine.scheduler.running):
            raise RuntimeError("secret details")
        return step()

    good = {"prompt": "a dog", "max_tokens": 60, "seed": 1}
    expected = live.http.post("/v1/completions", json=good).json()["choices"]
    monkeypatch.setattr(live.engine, "step", raising)
    with live.http.stream("POST", "/v1/completions", json={**good, "stream": True}) as reply:
        lines = reply.iter_lines()
        first = next(line for line in lines if line)
        bad = httpx.post(live.url + "/v1/completions", json={**good, "seed": 666}, timeout=60)
        rest = [line for line in lines if line]
    assert bad.status_code == 500 and bad.json()["error"]["type"] == "server_error"
    assert "secret" not in bad.text and "secret" in caplog.text
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in [first, *rest[:-1]]]
    assert "".join(texts) == expected[0]["text"]
    streamed = httpx.post(live.url + "/v1/completions", json={**good, "seed": 666, "stream": True}).text
    assert streamed.endswith("data: [DONE]\n\n") and '"server_error"' in streamed
    live.wait(live.is_idle)
    assert live.http.get("/health").status_code == 200


def test_a_grammar_that_is_too_much_work_is_the_clients_error_in_a_stream_too(live: Live) -> None:
    body = {"prompt": "x", "structured_outputs": {"regex": "a{1000}{1000}{1000}"}, "stream": True}
    text = live.http.post("/v1/completions", json=body).text
    assert '"invalid_request_error"' in text and text.endswith("data: [DONE]\n\n")


def test_numbers_that_are_not_finite_are_a_500(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = live.engine.runtime.logits
    monkeypatch.setattr(live.engine.runtime, "logits", lambda hidden: logits(hidden) * math.nan)
    reply = live.http.post("/v1/completions", json={"prompt": "x"})
    assert reply.status_code == 500 and "finite" not in reply.text


@pytest.mark.parametrize("kind", ["request", "grammar", "engine"])
def test_clients_are_told_of_their_own_mistakes_alone(
    kind: Literal["request", "grammar", "engine"], caplog: pytest.LogCaptureFixture
) -> None:
    error = refusal(Failure(kind, "details of a grammar"))
    assert isinstance(error, EngineError if kind == "engine" else ConfigError)
    assert ("details" in str(error), "details" in caplog.text) == (kind != "engine", kind == "engine")


def test_a_stop_string_between_tokens_that_are_not_spelled_ends_the_request(
    make_engine: MakeEngine, tokenizer_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tokenizer.bos_id
    b, a, c, d = (tokenizer.pieces.index(letter.encode()) for letter in "bacd")
    script = [b, a, b, *[hidden] * 9, c, hidden, d, a, a]
    with run_live(lambda: make_engine(draft_tokens=0), tokenizer_path) as live:
        for route, body in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            ids = iter(script)
            monkeypatch.setattr(live.engine.runtime, "logits", lambda _, ids=ids: torch.eye(300)[[next(ids)]])
            reply = live.http.post(route, json={**body, "temperature": 0, "max_tokens": 17, "stop": "abcd"}).json()
            (choice,) = reply["choices"]
            assert choice.get("text", choice.get("message", {}).get("content")) == "b"
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "abcd")
            assert reply["usage"]["completion_tokens"] == 15


@pytest.mark.parametrize("field", ["top_p", "temperature"])
@pytest.mark.parametrize("value", [0, 5e-324, 1e-45, 1e-12])
def test_the_smallest_numbers_are_greedy(live: Live, field: str, value: float) -> None:
    greedy = live.http.post("/v1/completions", json={"prompt": "x", "temperature": 0}).json()["choices"]
    found = live.http.post("/v1/completions", json={"prompt": "x", field: value}).json()
    assert found["choices"] == greedy


def test_special_tokens_in_what_users_write_stay_text(live: Live, tokenizer: Tokenizer) -> None:
    evil = "".join(tokenizer.specials) + "x"
    expected = [tokenizer.bos_id, *tokenizer.encode(evil)]
    assert live.http.post("/tokenize", json={"prompt": evil}).json()["tokens"] == expected
    assert not set(expected[1:]) & set(tokenizer.specials.values())
    talk = [{"role": role, "content": evil} for role in ("system", "user", "assistant", "tool")]
    tokens = live.http.post("/tokenize", json={"messages": talk}).json()["tokens"]
    plain = live.http.post("/tokenize", json={"messages": [{**m, "content": "x"} for m in talk]}).json()["tokens"]
    thoughts = {tokenizer.think_id, tokenizer.think_end_id}  # an assistant's own may be real
    found, known = ([id for id in ids if id in tokenizer.specials.values()] for ids in (tokens, plain))
    assert [id for id in found if id not in thoughts] == known


def test_a_template_in_a_request_has_no_effect(live: Live) -> None:
    plain = {"messages": TALK, "max_tokens": 4, "seed": 1}
    expected = live.http.post("/v1/chat/completions", json=plain).json()
    evil = {"chat_template_kwargs": {"chat_template": "evil", "messages": "evil", "enable_thinking": False}}
    found = live.http.post("/v1/chat/completions", json={**plain, **evil}).json()
    assert (found["choices"], found["usage"]["total_tokens"]) == (
        expected["choices"],
        expected["usage"]["total_tokens"],
    )
    for name, value in (("chat_template", "{{ 'x' * 10**9 }}"), ("documents", [{"url": "http://127.0.0.1:1/"}])):
        refused = live.http.post("/v1/chat/completions", json={**plain, name: value})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name


def test_a_model_that_is_not_served_is_a_404(live: Live) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": TALK}),
        ("/v1/completions", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ):
        reply = live.http.post(path, json={**body, "model": "../../etc/passwd"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        for name in ("tiny", "", None):
            assert live.http.post(path, json={**body, "model": name, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"prompt": "x",\n "max_tokens": }', "line 2, column 16"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "\xff"}', "byte 12"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_body_that_is_no_json_says_where(live: Live, body: bytes, place: str) -> None:
    reply = live.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and place in reply.json()["error"]["message"]


HALF = "\\ud83d"
PARTS = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PARTS}]}, "messages[0].content[1].type"),
        ("/v1/chat/completions", {"messages": [*TALK, {"role": "user", "content": "HALF"}]}, "messages[1].content"),
        ("/v1/chat/completions", {"messages": TALK, "metadata": {"a": ["HALF"]}}, "metadata.a[0]"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {"HALF": 1}}}, "structured_outputs.json"),
        ("/v1/chat/completions", {"messages": TALK, "tools": [{**TOOL, "function": {}}]}, "tools[0].function.name"),
        ("/v1/completions", {"prompt": ["a", "HALF"]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "a", "stop": ["x", 7]}, "stop[1]"),
        ("/tokenize", {"prompt": "HALF"}, "prompt"),
        ("/tokenize", {"messages": [{"role": "nobody"}]}, "messages[0].role"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]"),
        ("/detokenize", {}, "tokens"),
    ],
)  # fmt: skip
def test_errors_name_the_path_of_the_field(live: Live, path: str, body: dict[str, Any], field: str) -> None:
    content = json.dumps(body).replace("HALF", HALF)
    reply = live.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(f"{field}: "), reply.text


def test_whole_pairs_and_escapes_of_escapes_are_text(live: Live) -> None:
    content = b'{"prompt": "\\ud83d\\ude00 \\\\ud83d", "add_special_tokens": false}'
    ids = live.http.post("/tokenize", content=content, headers={"Content-Type": "application/json"}).json()["tokens"]
    assert live.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "\U0001f600 \\ud83d"}


def test_half_a_pair_that_the_model_writes_stays_text(live: Live) -> None:
    half = r"\\ud800"
    called = rf'<tool_call>\{{"name": "{half}", "arguments": \{{\}}\}}</tool_call>'
    body = {"messages": TALK, "max_tokens": 90, "tools": [TOOL], "structured_outputs": {"regex": called}}
    message = live.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["content"] == '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
    body["structured_outputs"] = {
        "regex": rf'<tool_call>\{{"name": "f", "arguments": \{{"a": "{half}"\}}\}}</tool_call>'
    }
    message = live.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": "\\ud800"}'


def test_head_is_answered_as_get_without_a_body(live: Live, guarded: Live) -> None:
    for path in ("/health", "/v1/models", "/version", "/", "/openapi.json"):
        seen, head = live.http.get(path), live.http.head(path)
        assert (head.status_code, head.content) == (200, b"") and head.headers["content-type"] == seen.headers[
            "content-type"
        ]
        assert head.headers["content-length"] == seen.headers["content-length"]
    assert live.http.head("/v1/nothing").status_code == 404 and live.http.head("/v1/completions").status_code == 405
    assert httpx.head(guarded.url + "/version").status_code == 401


def test_unknown_paths_and_methods_are_error_objects(live: Live) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 405)):
        reply = live.http.request(method, path)
        assert reply.status_code == status and reply.json()["error"]["type"] == "invalid_request_error"
    assert live.http.get("/web/../../app.py").status_code == 404
    assert live.http.get("/web/%2e%2e/app.py").status_code == 404


def test_the_page_has_a_strict_policy(make_engine: MakeEngine, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "app.js").write_text("1")
    with run_live(make_engine, tokenizer_path, key=KEY, web=tmp_path) as running:
        for path, text in (("/", "<p>page</p>"), ("/web/app.js", "1")):
            reply = httpx.get(running.url + path)
            assert (reply.status_code, reply.text) == (200, text)
            policy = reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert httpx.get(running.url + "/web/../index.html").status_code in (401, 404)
    with run_live(make_engine, tokenizer_path, web=tmp_path / "none") as running:
        assert "no chat page" in running.http.get("/").text
        assert running.http.get("/web/app.js").status_code == 404
