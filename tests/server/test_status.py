"""What the server tells of itself: metrics, loads of the experts, tokens and their experts."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from live import Live
from prometheus_client.parser import text_string_to_metric_families

from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.server import app
from moestro.server.loads import WINDOW_SECONDS, LoadHistory, layer_names
from moestro.server.worker import ClosedError


def read_metrics(live: Live) -> dict[tuple[str, ...], float]:
    text = live.http.get("/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(live: Live, tokenizer: Tokenizer) -> None:
    before = read_metrics(live)
    live.http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4, "n": 2, "ignored": 1})
    live.http.post("/v1/completions", json={"prompt": [1] * 2000})
    after = read_metrics(live)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("moestro_generation_tokens_total") == 8
    assert grown("moestro_prompt_tokens_total") == 6
    assert grown("moestro_request_success_total", "length") == 2
    assert grown("moestro_request_rejected_total", "context_length_exceeded") == 1
    assert grown("moestro_time_to_first_token_seconds_count") == 2
    assert grown("moestro_inter_token_latency_seconds_count") == 6
    assert grown("moestro_e2e_request_latency_seconds_count") == 2
    assert after["moestro_num_requests_running",] == after["moestro_num_requests_waiting",] == 0
    assert after["moestro_kv_cache_usage_perc",] == 0
    assert 1 <= after["moestro_expert_load_max_over_mean", "1"] <= 8
    assert all(name[0].startswith("moestro_") for name in after)
    names = {name[0] for name in after}
    assert {"moestro_spec_decode_num_drafts_total", "moestro_spec_decode_num_accepted_tokens_total"} <= names


def test_routing_counts_every_computed_token(live: Live) -> None:
    before = live.http.get("/routing").json()
    body = {"prompt": [41, 42, 43, 44], "max_tokens": 5, "temperature": 0, "return_routes": True}
    choice = live.http.post("/v1/completions", json=body).json()["choices"][0]
    after = live.http.get("/routing").json()
    routes = np.array(choice["routes"])
    assert routes.shape == (8, 1, 2)  # the last token written is not computed
    counts = np.bincount(routes[:, 0].ravel(), minlength=8)
    assert (np.array(after["total"]["load"]) - before["total"]["load"] >= counts).all()
    assert after["layers"] == ["1"] and (after["num_experts"], after["top_k"]) == (8, 2)
    assert after["total"]["tokens"] - before["total"]["tokens"] >= 8
    assert sum(after["recent"]["load"][0]) <= sum(after["total"]["load"][0])
    assert 0 < after["total"]["entropy"][0] <= 1 and after["recent"]["seconds"] >= 0


def test_recent_loads_are_those_of_the_window(make_config: Callable[..., Config]) -> None:
    history = LoadHistory(make_config().model)
    loads = np.zeros((1, 8), np.int64)
    assert history.describe(0.0, loads)["total"] == {
        "tokens": 0, "load": [[0] * 8], "entropy": [None], "max_over_mean": [None], "dead": [8],
    }  # fmt: skip
    for second in range(0, 200, 5):
        loads[0, second % 2] += 10
        told = history.describe(float(second), loads)
    assert told["total"]["load"][0][:3] == [200, 200, 0] and told["total"]["dead"] == [6]
    assert WINDOW_SECONDS <= told["recent"]["seconds"] <= WINDOW_SECONDS + 5
    assert told["recent"]["tokens"] * 2 == sum(told["recent"]["load"][0]) == 10 * told["recent"]["seconds"] / 5
    assert math.isclose(told["total"]["entropy"][0], 1 / 3, abs_tol=1e-6)  # two of eight: log 2 / log 8
    told = history.describe(300.0, loads * 0)
    assert told["recent"]["load"] == [[0] * 8]


def test_loads_are_sampled_again_after_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = iter([RuntimeError("no figures"), SimpleNamespace(loads=torch.ones(1, 2)), ClosedError("the end")])
    added: list[Any] = []

    async def read_stats() -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    worker = SimpleNamespace(is_alive=True, read_stats=read_stats)
    loads = SimpleNamespace(add=lambda moment, counts: added.append(counts.tolist()))
    monkeypatch.setattr(app, "SAMPLE_SECONDS", 0)
    asyncio.run(app._sample_loads(SimpleNamespace(worker=worker, loads=loads)))  # type: ignore[arg-type]
    assert added == [[[1.0, 1.0]]] and "no figures" in caplog.text


def test_a_dense_model_has_no_layers_to_tell_of(make_config: Callable[..., Config]) -> None:
    config = make_config("model.num_experts=0", "model.num_shared_experts=0").model
    assert layer_names(config) == []
    told = LoadHistory(config).describe(1.0, np.zeros((0, 0), np.int64))
    assert told["layers"] == [] and told["total"]["load"] == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_tell_tokens_and_their_experts(live: Live, tokenizer: Tokenizer, path: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "the cat"}], "prompt": "the cat", "max_tokens": 8, "seed": 3,
        "stream": True, "token_details": True, "return_routes": True,
    }  # fmt: skip
    with live.http.stream("POST", path, json=body) as reply:
        chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    tokens = [token for chunk in chunks for token in chunk.get("moestro", {}).get("tokens", [])]
    routes = chunks[-1]["choices"][0]["routes"]
    assert len(tokens) == 8 and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert [token["routes"] for token in tokens] == [*routes[-7:], None]
    text = tokenizer.decode([token["id"] for token in tokens])
    assert "".join(token["text"] for token in tokens) == text
    assert all(token["logprob"] <= 0 for token in tokens)
    plain = live.http.post(path, json={**body, "stream": False, "token_details": False}).json()["choices"][0]
    assert plain["routes"] == routes


def test_tokens_and_texts(live: Live, tokenizer: Tokenizer) -> None:
    reply = live.http.post("/tokenize", json={"prompt": "the cat 🙂", "add_special_tokens": False}).json()
    assert reply["tokens"] == tokenizer.encode("the cat 🙂") and reply["count"] == len(reply["tokens"])
    assert reply["max_model_len"] == 1024
    assert live.http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": "the cat 🙂"}
    assert live.http.post("/detokenize", json={"tokens": [0, 10**6]}).json() == {"prompt": "<｜begin▁of▁sentence｜>"}
    assert live.http.post("/tokenize", json={}).status_code == 400
