"""A server that speaks the contract of the chat page and does what the last message says, the same each time.

Its answers are scripts: lists of steps, a chunk or a `threading.Event` to wait for. What the page sent is kept.
"""

from __future__ import annotations

import json
import mimetypes
import re
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

import numpy as np

from moestro.routing import stats

WEB = resources.files("moestro.server") / "web"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LAYERS = ["1", "2", "3", "4", "5", "mtp.0"]
NUM_EXPERTS, TOP_K, NUM_PROMPT = 32, 4, 3
MODEL = "stub-moe"
HOSTILE = """<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>

[click](javascript:window.hacked=3) and [data](data:text/html,<script>window.hacked=4</script>) and
[fine](https://example.org/a?b=1) <a href="javascript:window.hacked=5" onclick="window.hacked=6">raw</a>

![picture](https://example.org/track.png) <svg onload="window.hacked=7"></svg>
<iframe src="javascript:window.hacked=8"></iframe> <b style="position:fixed">bold</b> [x](vbscript:a) [y](//example.org)

```html" onmouseover="window.hacked=9
<script>window.hacked = 10</script>
```
"""
MARKDOWN = """A router gives every token a **score** for each expert and keeps the best few. Two things follow:

1. the model is *large*, but each token uses little of it;
2. the load may become uneven, so `bias` terms push it back.

| scheme | score | balance |
|:--|:--|--:|
| Switch | softmax | 0.01 |
| DeepSeek-V3 | sigmoid | bias rule |

```python
def route(x, weight, bias, top_k):
    scores = (x @ weight.T).sigmoid()  # one score for every expert, before the bias that only chooses among them
    chosen = (scores + bias).topk(top_k).indices
    return chosen, scores.gather(-1, chosen)
```

> The bias chooses, the score weighs. 편향은 고르고, 점수는 무게를 준다.
"""
THOUGHT = "The question is about balance, so first the rule, then why it does not disturb the gradient."


def routes_of(token_id: int) -> list[list[int]]:
    """The experts of a token, `[layers][top_k]`."""
    steps = (3, 7, 11, 5)
    return [[(token_id * step + layer * 5 + step) % NUM_EXPERTS for step in steps] for layer in range(len(LAYERS))]


def logprob_of(token_id: int) -> float:
    return -round(0.02 + (token_id * 37 % 100) / 40, 4)


def split(text: str) -> list[str]:
    """Words with the space before them: the stub's tokens."""
    return re.findall(r"\n+|[^\S\n]*[^\s]+|[^\S\n]+", text)


def tokens_of(text: str, first_id: int = 0) -> list[dict[str, Any]]:
    """Tokens as the details of a chunk."""
    return [
        {"id": id, "text": piece, "logprob": logprob_of(id), "routes": None}
        for id, piece in enumerate(split(text), first_id)
    ]


def count_tokens(body: dict[str, Any]) -> int:
    """One token a word, and one more for every message."""
    texts = [message["content"] for message in body.get("messages", ())]
    if texts:
        return sum(1 + len(split(text)) for text in texts)
    return len(split(body["prompt"])) + bool(body.get("add_special_tokens", True))


def trace_of(token_id: int, is_first: bool) -> dict[str, Any]:
    """A token of `POST /trace`. The weights of a layer are those of its places; the second place is the strongest."""
    tree: dict[str, Any] = {"id": token_id, "text": f"p{token_id}", "name": f"n{token_id}"}
    tree |= {"experts": routes_of(token_id), "weights": [[0.2, 1.1, 0.4, 0.3]] * len(LAYERS)}
    if is_first:
        return {**tree, "logprob": None, "rank": None, "entropy": None, "top": []}
    top = [{"id": token_id + step, "name": f"n{token_id + step}", "logprob": -0.5 - step} for step in range(3)]
    numbers = {"logprob": logprob_of(token_id), "rank": 1 + token_id % 30, "entropy": token_id % 7 / 2}
    return {**tree, **numbers, "top": top}


def make_routing(load: Sequence[Sequence[int]], layers: Sequence[str] = LAYERS, scale: int = 7) -> dict[str, Any]:
    """The body of `GET /routing` for a recent load; since the start, `scale` times as much of its mirror image."""

    def window(counts: np.ndarray) -> dict[str, Any]:
        tokens = int(counts[0].sum()) // TOP_K if len(counts) else 0
        entropy = [None if np.isnan(value) else float(value) for value in stats.load_entropy(counts)] if tokens else []
        dead = stats.dead_experts(counts).tolist() if len(counts) else []
        return {"tokens": tokens, "load": counts.tolist(), "entropy": entropy, "dead": dead}

    counts = np.asarray(load, np.int64)
    total = counts[..., ::-1] * scale if len(counts) else counts
    shape = {"layers": list(layers), "num_experts": NUM_EXPERTS, "top_k": TOP_K}
    return {**shape, "total": window(total), "recent": {**window(counts), "seconds": 30}}


def even_load(seed: int = 0, tokens: int = 2000) -> list[list[int]]:
    """A load of realistic unevenness, one expert of the second layer without a token."""
    rng = np.random.default_rng(seed)
    share = np.exp(rng.normal(0, 0.55, (len(LAYERS), NUM_EXPERTS)))
    share[1, 5] = 0
    share /= share.sum(axis=1, keepdims=True)
    return [rng.multinomial(tokens * TOP_K, row).tolist() for row in share]


class Stub(ThreadingHTTPServer):
    """`gate` holds answers that wait; `disconnected` is set when the page hung up on one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """As it was at first."""
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []  # of the chat requests
        self.gate, self.disconnected = threading.Event(), threading.Event()
        self.key: str | None = None
        self.routing: dict[str, Any] | None = make_routing(even_load())
        self.num_polls = 0
        self.missing = ""  # a file of the page that is not found
        self.limit, self.is_base = 4096, False  # the model's context, and whether it continues texts
        self.usual: dict[str, Any] = {"reply_tokens": 512, "text_tokens": 128, "temperature": 0.7, "top_p": 0.9}
        self.traced: list[list[int]] = []
        self.is_gone = False  # connections are closed without an answer
        self.failures: list[tuple[Any, ...]] = []  # status, message, headers, code: one an answer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that the browser gives up are no news."""


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        if self.server.is_gone:
            return
        name = self.path.removeprefix("/web/") if self.path.startswith("/web/") else ""
        if self.path == "/" or (name and name != self.server.missing and (WEB / name).is_file()):
            self.send_file(name or "index.html")
        elif not self.has_key():
            self.send_failure(401, "wrong key")
        elif self.path == "/v1/models":
            told = {"max_model_len": self.server.limit, "base": self.server.is_base, "usual": self.server.usual}
            self.send_json({"object": "list", "data": [{"id": MODEL, "object": "model", **told}]})
        elif self.path == "/health":
            self.send_json({"status": "ok"})
        elif self.path == "/routing" and self.server.routing is not None:
            self.server.num_polls += 1
            self.send_json(self.server.routing)
        else:
            self.send_failure(404, "no such thing")

    def do_POST(self) -> None:
        if self.server.is_gone:
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in ("/tokenize", "/trace"):
            self.send_json(self.count(body) if self.path == "/tokenize" else self.trace(body))
            return
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        if not self.has_key():
            self.send_failure(401, "wrong key")
        elif self.server.failures:
            self.send_failure(*self.server.failures.pop(0))
        else:
            self.send_answer(body)

    def count(self, body: dict[str, Any]) -> dict[str, Any]:
        count = count_tokens(body)
        return {"tokens": list(range(900, 900 + count)), "count": count, "max_model_len": self.server.limit}

    def trace(self, body: dict[str, Any]) -> dict[str, Any]:
        self.server.traced.append(body["tokens"])
        tokens = [trace_of(id, at == 0) for at, id in enumerate(body["tokens"])]
        return {"layers": LAYERS, "num_experts": NUM_EXPERTS, "top_k": TOP_K, "vocab_size": 1000, "tokens": tokens}

    def has_key(self) -> bool:
        return self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def send_file(self, name: str) -> None:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff"}
        self.send_body(200, (WEB / name).read_bytes(), kind, headers)

    def send_json(self, tree: object) -> None:
        self.send_body(200, json.dumps(tree).encode(), "application/json", {})

    def send_failure(
        self, status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None
    ) -> None:
        error = {"error": {"message": message, "type": "error", "param": None, "code": code}}
        self.send_body(status, json.dumps(error).encode(), "application/json", headers or {})

    def send_body(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_answer(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for step in script(body, self.server.gate):
                if isinstance(step, threading.Event):
                    self.wait_for(step)
                else:
                    self.wfile.write(step)
        except (BrokenPipeError, ConnectionResetError):
            self.server.disconnected.set()

    def wait_for(self, event: threading.Event) -> None:
        """Comments keep coming meanwhile: writing tells whether anybody is there."""
        for _ in range(600):
            if event.wait(0.05):
                return
            self.wfile.write(b": ping\r\n\r\n")


def script(body: dict[str, Any], gate: threading.Event) -> Iterator[bytes | threading.Event]:
    """What is sent for the last message: bytes, or an event to wait for between them."""
    word = body["messages"][-1]["content"] if "messages" in body else "text"
    thought, text, late, finish = "", f"You said: {word}", False, "stop"
    match word:
        case "think":
            thought, text = THOUGHT, MARKDOWN
        case "markdown":
            text = MARKDOWN
        case "hostile":
            text = HOSTILE
        case "late":
            late, finish = True, "length"
        case "cut":
            finish = "length"
        case "text":  # a prompt is continued, and so is an answer that was cut short
            text = " and so on"
        case "long":
            text = "\n\n".join(f"Paragraph {number} of a long answer that goes on." for number in range(60))
        case "wide":
            table = "\n".join("|" + f" {cell} |" * 12 for cell in ("column", "---", "value"))
            text = "x" * 400 + " `" + "y" * 400 + "`\n\n" + table
        case "korean":
            text = "편향은 고르고, 점수는 무게를 준다. 🙂"
    thinking, saying = tokens_of(thought), tokens_of(text, len(tokens_of(thought)))
    waits = word in ("think", "slow", "broken", "midway")
    if thought:
        yield from deltas(body, thinking, "reasoning_content", late)
        yield gate
    half = (len(saying) + 1) // 2 if waits and not thought else len(saying)
    if word == "korean":
        yield from cut(b"".join(deltas(body, saying, "content", late)))
    else:
        yield from deltas(body, saying[:half], "content", late)
    if word == "midway":
        yield event({"error": {"message": "the engine failed over this request", "type": "server_error"}})
    if word in ("broken", "midway"):
        return
    if half < len(saying):
        yield gate
        yield from deltas(body, saying[half:], "content", late)
    yield from ending(body, thinking + saying, finish)


def deltas(body: dict[str, Any], tokens: list[dict[str, Any]], field: str, late: bool) -> Iterator[bytes]:
    for token in tokens:
        part = {"delta": {field: token["text"]}} if "messages" in body else {"text": token["text"]}
        chunk: dict[str, Any] = {"choices": [{"index": 0, **part, "finish_reason": None}]}
        if body.get("token_details"):
            chunk["moestro"] = {"tokens": [token if late else token | {"routes": routes_of(token["id"])}]}
        yield event(chunk)


def ending(body: dict[str, Any], tokens: list[dict[str, Any]], finish: str) -> Iterator[bytes]:
    """The final chunk with the experts of all tokens but the last, which was not fed back, then usage."""
    end = {"delta": {}} if "messages" in body else {"text": ""}
    choice: dict[str, Any] = {"index": 0, **end, "finish_reason": finish}
    num_prompt = len(body["prompt"]) if isinstance(body.get("prompt"), list) else NUM_PROMPT
    if body.get("return_routes"):
        choice["routes"] = [routes_of(900 + at) for at in range(num_prompt)]
        choice["routes"] += [routes_of(token["id"]) for token in tokens[:-1]]
    yield event({"choices": [choice]})
    if body.get("stream_options", {}).get("include_usage"):
        yield event({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": len(tokens)}})
    yield b"data: [DONE]\n\n"


def event(tree: object) -> bytes:
    return b"data: " + json.dumps(tree, ensure_ascii=False).encode() + b"\n\n"


def cut(data: bytes, size: int = 7) -> Iterator[bytes]:
    """Pieces that end in the middle of characters and lines, apart so that they are not sent together."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
        time.sleep(0.002)
