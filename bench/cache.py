"""What an FP8 latent cache saves and costs, beside one in the type of the activations: bytes, quality, speed.

    python bench/cache.py                          # random weights, DeepSeek-V3's latents: bytes, change, speed
    python bench/cache.py --model DIR [--data SRC] # a run, a checkpoint or a Hugging Face directory

Quality: documents of SRC (`train --data`; the built-in text without it) are joined and cut into rows of 4096 tokens, or
of the model's length, and each row is scored with both caches. By position in the row, that is by context, are printed
the bits per byte, their relative change, and the share of tokens that both caches find likeliest. Random weights choose
experts and tokens by hair's breadths, so there only bytes and speed say anything.

Speed: greedy decoding of one stream, `--tokens` tokens after a prompt of `context` tokens. A cache is a process of its
own that waits while the other runs; a round asks each for every context. Prompts are found again after the first round.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from workers import Worker, answer

CACHES = ("auto", "fp8")
CONTEXTS = (64, 1024, 4096)
BOUNDS = (0, 256, 1024, 4096)  # of positions
SHAPE = {
    "vocab_size": 8192, "hidden_dim": 512, "num_layers": 8, "num_heads": 16, "kv_lora_rank": 512, "nope_dim": 64,
    "rope_dim": 64, "v_dim": 64, "dense_dim": 1024, "num_experts": 16, "top_k": 4, "expert_dim": 128,
    "max_seq_len": 4608, "init_std": 0.06,
}  # fmt: skip


def read_tokens(tokenizer: Any, source: str, count: int) -> list[int]:
    """The first tokens of a source's documents, one after another."""
    from moestro.data.corpus import iterate_documents

    tokens: list[int] = []
    for document in iterate_documents(source):
        tokens += [tokenizer.bos_id, *tokenizer.encode(document.text)]
        if len(tokens) >= count:
            break
    return tokens[:count]


def show_quality(directory: str, source: str, rows: int) -> None:
    """Score the same rows with both caches."""
    import torch

    from moestro.engine.language_model import load
    from moestro.engine.runtime import Texts

    scores: dict[str, list[Any]] = {}
    for cache in CACHES:
        model = load(directory, cache=cache)
        length = min(BOUNDS[-1], model.config.max_seq_len)
        tokens = torch.tensor(read_tokens(model.tokenizer, source, rows * length))
        tokens = tokens[: len(tokens) // length * length].view(-1, length)
        targets = tokens.roll(-1, 1)
        targets[:, -1] = -100
        texts = [Texts(row, [0, length], target) for row, target in zip(tokens, targets, strict=True)]
        scores[cache] = list(model.runtime.score(texts))
    spelled = torch.zeros(model.config.vocab_size)
    spelled[: len(model.tokenizer.token_bytes)] = torch.tensor(model.tokenizer.token_bytes)
    print(f"{len(tokens)} rows of {length} tokens of {source}")
    print(f"{'context':<12} {'bits/byte':>10} {'with fp8':>10} {'change':>9} {'same likeliest':>15}")
    for low, high in pairwise(BOUNDS):
        at = slice(low, min(high, length - 1))
        if at.start >= at.stop:
            continue
        size = float(spelled[targets[:, at]].sum()) * math.log(2)
        plain, coded = (sum(float(s.nll[at].sum(dtype=torch.float64)) for s in scores[c]) / size for c in CACHES)
        same = [a.argmax[at] == b.argmax[at] for a, b in zip(*scores.values(), strict=True)]
        agreement = float(torch.cat(same).float().mean())
        print(f"{f'{low}–{at.stop}':<12} {plain:>10.4f} {coded:>10.4f} {coded / plain - 1:>+9.3%} {agreement:>15.2%}")


def work(cache: str, directory: str) -> None:
    """The worker of a cache: decodes after prompts of some length, which it keeps."""
    from moestro.engine.engine import Engine
    from moestro.engine.language_model import load
    from moestro.engine.sequence import Request, SamplingParams

    model = load(directory, cache=cache)
    memory = 2 * model.config.max_seq_len * 4 * 2**10 * (model.config.num_layers + model.config.mtp_depth)
    engine = Engine(model.runtime, model.tokenizer, frozenset(), memory_bytes=memory, max_running=1, draft_tokens=0)
    answer({"pages": engine.scheduler.pool.num_pages})
    for line in sys.stdin:
        context, count = map(int, line.strip("[]\n ").split(","))
        prompt = [(7 * i * i + i) % model.config.vocab_size for i in range(context)]
        engine.add(Request(prompt, SamplingParams(max_tokens=count + 1)))
        while not any(event.token is not None for event in engine.step()):
            pass
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        answer(time.perf_counter() - start)


def show_speed(directory: str, most: int, rounds: int, count: int) -> None:
    """Ask both caches in turn and print the table."""
    workers = {cache: Worker(__file__, cache, directory) for cache in CACHES}
    print(f"{'context':>7} {'cache':<5} {'tokens/s':>9} {'spread':>13} {'ratio':>6}")
    for context in (c for c in CONTEXTS if c + count < most):
        speeds: dict[str, list[float]] = {cache: [] for cache in CACHES}
        for turn in range(rounds + 1):
            for cache in CACHES[:: 1 if turn % 2 else -1]:
                speeds[cache].append(count / workers[cache].ask([context, count]))
        middle = {cache: statistics.median(values[1:]) for cache, values in speeds.items()}  # the first warms up
        for cache, (_, *values) in speeds.items():
            spread, ratio = f"{min(values):.1f}–{max(values):.1f}", middle[cache] / middle[CACHES[0]]
            print(f"{context:>7} {cache:<5} {middle[cache]:>9.1f} {spread:>13} {ratio:>6.2f}")
    for worker in workers.values():
        worker.close()


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a run, a checkpoint or a Hugging Face directory; else random weights")
    parser.add_argument("--data", default="builtin", help="the text to score")
    parser.add_argument("--rows", type=int, default=4, help="rows of text to score")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    from moestro.checkpoints.files import read_config
    from moestro.checkpoints.random_weights import write_random_model
    from moestro.config import ModelConfig
    from moestro.engine.language_model import find_model_directory
    from moestro.model.size import cache_bytes_per_token

    with tempfile.TemporaryDirectory(prefix="moestro-") as scratch:
        directory = options.model or str(Path(scratch) / "model")
        if not options.model:
            write_random_model(ModelConfig(**SHAPE), Path(directory), seed=0, dtype="bf16")
        config = read_config(find_model_directory(Path(directory)))
        print("cache bytes per token:", ", ".join(f"{size:,} {k}" for k, size in cache_bytes_per_token(config).items()))
        show_quality(directory, options.data, options.rows)
        show_speed(directory, config.max_seq_len, options.rounds, options.tokens)


if __name__ == "__main__":
    main()
