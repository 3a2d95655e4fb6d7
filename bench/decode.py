"""What a step of a small model costs, where calls and not arithmetic are the limit: 10M parameters, random weights.

    python bench/decode.py                      # fp32 and bf16; one stream, one stream with drafts, 16 streams
    python bench/decode.py --against ../before  # beside another state of the package, in turn
    python bench/decode.py --parts              # where the time of a step of one stream goes

A mode is a process of its own that waits while the others run; a round asks every mode for every case. Timed is the
greedy decoding of `--tokens` tokens per stream, the prompt of 16 tokens apart. Random weights accept no drafts, so the
case with one draft a step says what a draft costs, not what it gains (`bench/serve.py --mtp` does, on a trained model).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workers import Worker, answer

SHAPE = {"vocab_size": 8192, "tie_embeddings": True, "expert_dim": 48, "mtp_depth": 1, "init_std": 0.1}
DTYPES = ("fp32", "bf16")
CASES = {"1 stream": (1, 0), "1 stream, 1 draft": (1, 1), "16 streams": (16, 0)}  # streams, drafts a step
PARTS = {"forward": "runtime", "logits": "runtime", "prepare": "cache", "_choose": "engine"}


def make_engines(dtype: str) -> dict[int, Any]:
    """An engine without drafts and one with, of one model."""
    from moestro.checkpoints.packing import pack_model
    from moestro.config import ModelConfig
    from moestro.data.tokenizer import Tokenizer
    from moestro.engine.engine import Engine
    from moestro.engine.runtime import Runtime
    from moestro.model.transformer import Transformer, init_weights

    model = Transformer(ModelConfig(**SHAPE), dtype).eval()
    init_weights(model, 0)
    runtime, tokenizer = Runtime(pack_model(model)), Tokenizer.builtin()  # which is for grammars and stop strings only
    return {
        k: Engine(runtime, tokenizer, frozenset(), memory_bytes=2**27, draft_tokens=k, draft_cost=0.0) for k in (0, 1)
    }


def decode(engine: Any, streams: int, count: int) -> float:
    """Seconds for `count` tokens of each stream, after the first one."""
    from moestro.engine.sequence import Request, SamplingParams

    for i in range(streams):
        engine.add(Request([(7 * i + j) % 8192 for j in range(16)], SamplingParams(max_tokens=count + 1)))
    waiting = streams
    while waiting:
        waiting -= sum(event.token is not None for event in engine.step())
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def work(dtype: str) -> None:
    """The worker of a mode."""
    engines = make_engines(dtype)
    for engine in engines.values():
        decode(engine, 1, 8)
    answer({})
    for line in sys.stdin:
        streams, drafts, count = map(int, line.strip("[]\n ").split(","))
        answer(decode(engines[drafts], streams, count))


def compare(trees: dict[str, Path], rounds: int, count: int) -> None:
    """Ask all modes in turn and print the table."""
    workers = {
        (name, dtype): Worker(
            str(tree.resolve() / "bench" / "decode.py"), dtype, environment={"PYTHONPATH": str(tree.resolve())}
        )
        for dtype in DTYPES
        for name, tree in trees.items()
    }
    speeds: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(rounds):
        for case, (streams, drafts) in CASES.items():
            for (name, dtype), worker in workers.items():
                seconds = worker.ask([streams, drafts, count])
                speeds.setdefault((case, dtype, name), []).append(streams * count / seconds)
    print(f"{'case':<18} {'type':<5} {'tree':<8} {'tokens/s':>9} {'spread':>13}")
    for (case, dtype, name), values in speeds.items():
        spread = f"{min(values):.0f}–{max(values):.0f}"
        print(f"{case:<18} {dtype:<5} {name:<8} {statistics.median(values):>9.0f} {spread:>13}")
    for worker in workers.values():
        worker.close()


@contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time inside a method of an object to seconds[name]."""
    method = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            seconds[name] += time.perf_counter() - start

    setattr(owner, name, call)
    yield
    delattr(owner, name)


def show_parts(dtype: str, rounds: int, count: int) -> None:
    """Microseconds a step of one stream spends in each part; medians over rounds."""
    engine = make_engines(dtype)[0]
    owners = {"runtime": engine.runtime, "cache": engine.cache, "engine": engine}
    found: list[dict[str, float]] = []
    decode(engine, 1, count)
    for _ in range(rounds):
        seconds = dict.fromkeys(PARTS, 0.0)
        contexts = [timed(owners[owner], name, seconds) for name, owner in PARTS.items()]
        for context in contexts:
            context.__enter__()
        seconds["all"] = decode(engine, 1, count)
        for context in contexts:
            context.__exit__(None, None, None)
        seconds["the rest of a step"] = seconds["all"] - sum(seconds[name] for name in PARTS)
        found.append(seconds)
    for name in found[0]:
        print(f"{dtype}  {name:<20} {statistics.median(part[name] for part in found) / count * 1e6:>7.0f} µs")


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another tree of this repository, its kernels built")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    if options.parts:
        for dtype in DTYPES:
            show_parts(dtype, options.rounds, options.tokens)
        return
    here = {"this": Path(__file__).parent.parent}
    compare(({"before": options.against} if options.against else {}) | here, options.rounds, options.tokens)


if __name__ == "__main__":
    main()
