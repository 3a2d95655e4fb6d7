"""What a request leaves open is the model's: how to sample it; and what its text becomes is the directory's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from moestro.data.tokenizer import Tokenizer
from moestro.engine.defaults import GenerationDefaults
from moestro.engine.engine import Engine
from moestro.engine.sequence import SamplingParams
from moestro.server.app import create_app
from moestro.server.schema import ChatRequest, CompletionRequest
from moestro.server.service import DEFAULTS, Service

USER = "<｜User｜>"
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def make_service(make_engine: Callable[..., Engine], tokenizer_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(**values: float) -> Service:
        defaults = GenerationDefaults(**values)  # type: ignore[arg-type]
        made.append(Service(make_engine, tokenizer_path, "tiny", defaults=defaults))
        return made[-1]

    yield make
    for service in made:
        service.close()


def sampled(service: Service, **body: Any) -> list[SamplingParams]:
    """The settings that a completion and a chat with these fields get."""
    text = asyncio.run(service.prepare_text(CompletionRequest(prompt="a", **body)))
    chat = asyncio.run(service.prepare_chat(ChatRequest.model_validate({"messages": TALK, **body})))
    return [prepared.requests[0].params for prepared in (text, chat)]


def test_the_models_recommendations_hold_where_a_request_says_nothing(make_service: Callable[..., Service]) -> None:
    service = make_service(temperature=0.6, top_k=20, repetition_penalty=1.1)
    for params in sampled(service):
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 1.0, 20, 1.1)
    for params in sampled(service, temperature=0, top_k=-1, top_p=0.5, repetition_penalty=1.0):
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.0, 0.5, 0, 1.0)
    for params in sampled(make_service()):
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1.0, 1.0, 0, 1.0)


def test_a_model_says_its_defaults(make_service: Callable[..., Service]) -> None:
    with TestClient(create_app(make_service(temperature=0.6, top_k=20)), base_url="http://127.0.0.1") as client:
        (model,) = client.get("/v1/models").json()["data"]
    assert model["defaults"] == {**DEFAULTS, "temperature": 0.6, "top_k": 20}


def test_special_tokens_of_a_text(make_service: Callable[..., Service], tokenizer: Tokenizer) -> None:
    text = f"a{USER}b"
    plain, marked = tokenizer.encode(text), [*tokenizer.encode("a"), 3, *tokenizer.encode("b")]
    cases: list[tuple[dict[str, bool], list[int]]] = [
        ({}, [0, *plain]),
        ({"parse_special": True}, [0, *marked]),
        ({"add_special_tokens": False}, plain),
        ({"add_special_tokens": False, "parse_special": True}, marked),
    ]
    with TestClient(create_app(make_service()), base_url="http://127.0.0.1") as client:
        for fields, ids in cases:
            assert client.post("/tokenize", json={"prompt": text, **fields}).json()["tokens"] == ids
            body = {"prompt": text, "max_tokens": 1, "temperature": 0, **fields}
            assert client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"] == len(ids)


def test_a_directory_without_bos_gets_none(
    make_engine: Callable[..., Engine], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tree, "post_processor": None}), "utf-8")
    without = Tokenizer.from_file(tmp_path)

    def make() -> Engine:
        engine = make_engine()
        engine.tokenizer = without
        return engine

    service = Service(make, tmp_path, "tiny")
    try:
        prepared = asyncio.run(service.prepare_text(CompletionRequest(prompt="the cat")))
        assert prepared.requests[0].prompt == without.encode("the cat")
    finally:
        service.close()
