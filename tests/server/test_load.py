"""Many clients at once, a fifth of whom hang up: everybody else gets the text computed alone, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import Held, Live, MakeEngine, run_live

from moestro.data.tokenizer import Tokenizer
from moestro.engine.sequence import Request, SamplingParams

CLIENTS, REQUESTS_EACH = 16, 3


def make_body(rng: random.Random) -> dict[str, Any]:
    beginning = [7 + n % 200 for n in range(70)] if rng.random() < 0.3 else []
    return {
        "prompt": beginning + [rng.randrange(7, 300) for _ in range(rng.randint(1, 120))],
        "max_tokens": rng.randint(1, 25),
        "temperature": rng.choice([0, 0.8]),
        "seed": rng.randrange(1000),
        "stream": rng.random() < 0.7,
    }


async def read(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    if not body["stream"]:
        reply = await http.post("/v1/completions", json=body)
        return reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text
    text = ""
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


async def be_client(live: Live, bodies: list[dict[str, Any]], rng: random.Random) -> list[str | None]:
    """The texts; None where this client hung up."""
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
        return [
            await hang_up(live, http, body, rng.randrange(50)) if rng.random() < 0.2 else await read(http, body)
            for body in bodies
        ]


async def hang_up(live: Live, http: httpx.AsyncClient, body: dict[str, Any], steps: int) -> None:
    """Ask for much and leave after a few steps of the engine, which waits for that: 800 tokens take hundreds."""
    held = Held(live.engine.step, after=steps)
    live.engine.step = held  # type: ignore[method-assign]
    endless = {**body, "max_tokens": 800, "logit_bias": {"1": -100}}  # no end of sequence before
    reading = asyncio.ensure_future(read(http, endless))
    try:
        async with asyncio.timeout(60):
            while not held.reached.is_set():
                await asyncio.sleep(0.002)
        assert not reading.done()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    finally:
        held.release()


def test_many_clients_of_whom_some_hang_up(make_engine: MakeEngine, tokenizer_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    bodies = [[make_body(rng) for _ in range(REQUESTS_EACH)] for _ in range(CLIENTS)]

    async def run(live: Live) -> list[list[str | None]]:
        return await asyncio.gather(*(be_client(live, own, random.Random(n)) for n, own in enumerate(bodies)))

    threads = threading.active_count()
    with run_live(lambda: make_engine(num_pages=48, max_running=12, token_budget=64), tokenizer_path) as live:
        found = asyncio.run(run(live))
        live.wait(live.is_idle)
        assert not live.service.worker._jobs and not live.service.worker._streams
        assert not live.engine._requests
        assert live.http.get("/health").status_code == 200
    assert threading.active_count() == threads
    alone = make_engine()
    count = 0
    for texts, own in zip(found, bodies, strict=True):
        for text, body in zip(texts, own, strict=True):
            settings = {name: body[name] for name in ("max_tokens", "temperature", "seed")}
            if text is not None:
                ((completion,),) = alone.run([Request(body["prompt"], SamplingParams(**settings))])
                assert text == tokenizer.decode(completion.ids)
                count += 1
    assert count > CLIENTS * REQUESTS_EACH // 2 and None in [text for texts in found for text in texts]
