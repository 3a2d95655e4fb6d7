"""`POST /trace` over HTTP: what the page shows of tokens is what the API generated."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable

import pytest
from live import Live

from moestro.cli.chat import chat
from moestro.cli.generate import generate
from moestro.data.tokenizer import Tokenizer
from moestro.engine.conversation import USUAL
from moestro.engine.defaults import GenerationDefaults
from moestro.engine.scheduler import QueueFullError
from moestro.server.traces import MAX_TRACED, MAX_WAITING, TraceRequest, Tracing


def test_a_trace_is_that_of_the_completion(live: Live, tokenizer: Tokenizer) -> None:
    prompt = [tokenizer.bos_id, *tokenizer.encode("the cat sat on the mat and the dog ran over the hill")]
    body = {"prompt": prompt, "max_tokens": 0, "logprobs": 2, "echo": True, "return_routes": True}
    choice = live.http.post("/v1/completions", json=body).json()["choices"][0]
    reply = live.http.post("/trace", json={"tokens": prompt, "top_logprobs": 2}).json()
    tokens, scores = reply["tokens"], choice["logprobs"]
    assert [token["name"] for token in tokens] == scores["tokens"]
    assert tokens[0]["logprob"] is None and tokens[0]["top"] == []
    assert [token["logprob"] for token in tokens] == scores["token_logprobs"]
    for token, top in zip(tokens[1:], scores["top_logprobs"][1:], strict=True):
        best = {one["name"]: one["logprob"] for one in token["top"]}
        assert top == pytest.approx({**best, token["name"]: token["logprob"]}, abs=1e-4)
        assert (token["rank"] == 1) == (token["top"][0]["id"] == token["id"]) and token["entropy"] >= 0
    assert [token["experts"] for token in tokens] == choice["routes"]
    assert all(len(row) == reply["top_k"] for token in tokens for row in token["weights"])
    assert "".join(token["text"] for token in tokens) == tokenizer.decode(prompt)
    assert (reply["layers"], reply["num_experts"], reply["vocab_size"]) == (["1"], 8, 300)


@pytest.mark.parametrize("tokens", [[], [300], [-1], [1] * (MAX_TRACED + 1), [1] * 1025, "the cat"])
def test_texts_that_cannot_be_traced_get_a_400(live: Live, tokens: object) -> None:
    reply = live.http.post("/trace", json={"tokens": tokens})
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_few_may_wait(live: Live) -> None:
    async def ask() -> list[object]:
        tracing = Tracing(live.service)
        body = TraceRequest(tokens=[1, 2, 3])
        return await asyncio.gather(*(tracing.trace(body) for _ in range(MAX_WAITING + 1)), return_exceptions=True)

    replies = asyncio.run(ask())
    assert [isinstance(reply, QueueFullError) for reply in replies] == [False] * MAX_WAITING + [True]


def test_the_model_says_what_it_is_and_how_to_write_with_it(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = live.http.get("/v1/models").json()["data"]
    assert model["base"] is True  # our template alone tells nothing
    assert model["usual"] == {
        "reply_tokens": default_of(chat, "max_tokens"), "text_tokens": default_of(generate, "max_tokens"), **USUAL
    }  # fmt: skip
    monkeypatch.setattr(live.service.tokenizer, "chat_template", "{{ messages[0].content }}")
    monkeypatch.setattr(live.service, "defaults", GenerationDefaults(temperature=0.3, top_k=5))
    (model,) = live.http.get("/v1/models").json()["data"]
    assert model["base"] is False
    assert (model["usual"]["temperature"], model["usual"]["top_k"], model["usual"]["top_p"]) == (0.3, 5, USUAL["top_p"])


def default_of(command: Callable[..., object], name: str) -> object:
    """What the command line takes if nothing is given."""
    return inspect.signature(command).parameters[name].default
