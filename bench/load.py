"""Many clients at a server, some of whom hang up: are all answers those computed alone, and how long do they take?

    python bench/load.py                         # a small random model, 64 clients, two minutes
    python bench/load.py --model runs/demo --clients 16 --seconds 30

Starts `moestro serve` on a free port of loopback. A fixed set of requests of mixed lengths is first answered one at a
time; then every client picks among them, and a fifth of the requests are hung up on midway. Printed: latency
percentiles, tokens/s, answers that differ (must be 0), pages, memory and threads of the server before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

SMALL = ("model.num_layers=4", "model.max_seq_len=2048")
HANG_UP = 0.2


@dataclass
class Found:
    """What the clients saw, in seconds and counts."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    pieces: int = 0
    wrong: int = 0
    hung_up: int = 0
    refused: int = 0


def make_bodies(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Prompts of 5 to 900 tokens, a third with the same beginning; 8 to 120 tokens to write; half of them sampled."""
    beginning = [rng.randrange(10, 4000) for _ in range(300)]
    return [
        {
            "prompt": (beginning if i % 3 == 0 else []) + [rng.randrange(10, 4000) for _ in range(rng.randint(5, 600))],
            "max_tokens": rng.randint(8, 120),
            "temperature": 0.8 * (i % 2),
            "seed": i,
            "stream": True,
        }
        for i in range(count)
    ]


@contextmanager
def serving(model: Path, memory: str) -> Iterator[tuple[int, str]]:
    """The process id and the address of a server."""
    command = [sys.executable, "-m", "moestro", "serve", str(model), "--port", "0", "--memory", memory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().split()[-1]
        finally:
            process.terminate()


async def ask(http: httpx.AsyncClient, body: dict[str, Any], found: Found, max_pieces: int | None = None) -> str | None:
    """The text; None if it was refused or, after `max_pieces` pieces, hung up on."""
    begun = last = time.perf_counter()
    pieces: list[str] = []
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code == 429:
            found.refused += 1
            return None
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            (found.between if pieces else found.first).append(now - last)
            last = now
            pieces.append(json.loads(line[6:])["choices"][0]["text"])
            if len(pieces) == max_pieces:
                found.hung_up += 1
                return None
    found.whole.append(last - begun)
    found.pieces += len(pieces)
    return "".join(pieces)


async def be_client(url: str, cases: list[tuple[dict[str, Any], str]], rng: random.Random, end: float) -> Found:
    """Ask until the time is over."""
    found = Found()
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        while time.perf_counter() < end:
            body, expected = rng.choice(cases)
            text = await ask(http, body, found, rng.randint(1, 8) if rng.random() < HANG_UP else None)
            found.wrong += text is not None and text != expected
    return found


def watch(pid: int, url: str) -> dict[str, float]:
    """Memory in MiB, threads, and the share of pages in use."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    text = httpx.get(url + "/metrics", timeout=60).text
    metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("moestro_"))
    return {
        "memory MiB": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "pages in use": float(metrics["moestro_kv_cache_usage_perc"]),
        "running": float(metrics["moestro_num_requests_running"]),
        "waiting": float(metrics["moestro_num_requests_waiting"]),
    }


async def run(pid: int, url: str, clients: int, seconds: float) -> None:
    """The whole measurement."""
    rng = random.Random(0)
    alone = Found()
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        cases = [(body, await ask(http, body, alone) or "") for body in make_bodies(rng, 24)]
    print_times("one at a time", alone)
    before = watch(pid, url)
    begun = time.perf_counter()
    work = (be_client(url, cases, random.Random(n), begun + seconds) for n in range(clients))
    parts = await asyncio.gather(*work)
    took = time.perf_counter() - begun
    found = Found()
    for part in parts:
        for name, value in vars(part).items():
            setattr(found, name, getattr(found, name) + value)
    print_times(f"{clients} clients", found)
    print(
        f"{len(found.whole)} answers in {took:.0f} s, {found.pieces / took:.0f} chunks/s, {found.hung_up} hung up on,"
    )
    print(f"{found.refused} refused, {found.wrong} different from those computed alone")
    await asyncio.sleep(1)
    for name, value in watch(pid, url).items():
        print(f"{name:>14}: {before[name]:10.2f} before, {value:10.2f} after")


def print_times(title: str, found: Found) -> None:
    """Percentiles in milliseconds."""
    for name, values in (("first token", found.first), ("between tokens", found.between), ("whole", found.whole)):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        figures = "  ".join(f"p{percent} {cuts[percent - 1] * 1e3:8.1f}" for percent in (50, 90, 99))
        print(f"{title:>14}  {name:>14}  {figures} ms")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--memory", default="512MiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "small"
        if options.model is None:
            subprocess.run(
                [sys.executable, "-m", "moestro", "init", "--preset", "demo", "--out", model, *SMALL], check=True
            )
        with serving(model, options.memory) as (pid, url):
            asyncio.run(run(pid, url, options.clients, options.seconds))


if __name__ == "__main__":
    main()
