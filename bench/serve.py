"""Serving speed: Moestro beside transformers on one DeepSeek-V3-family model, in turn; and what MTP speculation gains.

    python bench/serve.py                                   # Moonlight's shape with 8 layers, random weights, bf16
    python bench/serve.py --modes "moestro int8;moestro int4"
    python bench/serve.py --mtp runs/demo                   # a trained model on real text: acceptance and speed

A mode is a process of its own that waits while the others run; a round asks every mode for every case. Timed is the
decoding of `--tokens` tokens per stream after a prompt of `context` random tokens, the prompt apart. transformers is
called without the overhead of `generate`: its forward pass and its own cache. Beside each figure stands what the memory
allows: the bytes of the weights that a step touches (of the experts, the share that so many tokens hit on average) over
the read bandwidth measured in the same run.

The first call writes the model (9.4 GB) to `--model`; two modes in bf16 need 20 GiB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from workers import Worker, answer

SHAPE = ["--preset", "moonlight-16b-a3b", "model.num_layers=8", "model.q_lora_rank=1024"]
MODEL = Path("runs/bench-serve")
CASES = [(1, 16), (1, 512), (1, 4096), (16, 16)]  # streams, context
MODES = ("moestro bf16", "transformers bf16")


def serve_ours(directory: str, weights: str) -> None:
    """The worker of a Moestro mode."""
    import torch

    from moestro.engine.engine import Engine
    from moestro.engine.language_model import load
    from moestro.engine.sequence import Request, SamplingParams

    m = load(directory, weights=weights)
    engine = Engine(m.runtime, m.tokenizer, m.stop_ids, memory_bytes=2**30, draft_tokens=0)
    vocabulary = engine.runtime.config.vocab_size
    answer({"routed_bytes": engine.runtime.routed_bytes, "other_bytes": engine.runtime.other_bytes})
    for line in sys.stdin:
        streams, context, count = map(int, line.strip("[]\n ").split(","))
        params = SamplingParams(max_tokens=count + 1)
        start = time.perf_counter()
        for _ in range(streams):
            engine.add(Request(torch.randint(0, vocabulary, (context,)).tolist(), params))
        waiting = streams
        while waiting:
            waiting -= sum(event.token is not None for event in engine.step())
        first = time.perf_counter()
        while engine.has_work:
            engine.step()
        answer({"first": first - start, "rest": time.perf_counter() - first})


def serve_transformers(directory: str) -> None:
    """The worker of transformers: forward passes over its own cache."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    answer({})
    for line in sys.stdin:
        streams, context, count = map(int, line.strip("[]\n ").split(","))
        with torch.inference_mode():
            tokens = torch.randint(0, model.config.vocab_size, (streams, context))
            start = time.perf_counter()
            output = model(tokens, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(count):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
        answer({"first": first - start, "rest": time.perf_counter() - first})


def work(mode: str, directory: str) -> None:
    """One mode."""
    name, weights = mode.split()
    if name == "moestro":
        serve_ours(directory, weights)
    else:
        serve_transformers(directory)


def touched_share(num_experts: int, top_k: int, tokens: int) -> float:
    """The share of the experts that so many tokens hit, on average, if each hits `top_k` at random."""
    return 1 - (1 - top_k / num_experts) ** tokens


def write_model(directory: Path) -> None:
    """The model that is measured, written where it is not there yet."""
    if not directory.exists():
        subprocess.run([sys.executable, "-m", "moestro", "init", *SHAPE, "--out", str(directory)], check=True)


def compare(directory: Path, modes: list[str], rounds: int, count: int) -> None:
    """Ask all modes in turn and print the table."""
    from moestro.checkpoints.files import read_config
    from moestro.machine import describe_machine, measure_machine

    write_model(directory)
    machine, measured, config = describe_machine(), measure_machine(4), read_config(directory)
    bandwidth = measured.read_gb_per_second * 1e9
    print(f"{machine.cpu}, {machine.threads} threads, torch {machine.torch}; {bandwidth / 1e9:.0f} GB/s read")
    workers = {mode: Worker(__file__, mode, str(directory)) for mode in modes}
    times: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for worker in workers.values():
        worker.ask([1, 16, 2])  # warm up
    for _ in range(rounds):
        for streams, context in CASES:
            for mode, worker in workers.items():
                found = worker.ask([streams, context, count])
                times.setdefault((mode, streams, context), []).append(found)
                speed = streams * count / found["rest"]
                print(f"{mode}, {streams} x {context}: {found['first']:.2f} s, {speed:.1f} tokens/s", file=sys.stderr)
    baseline = next((mode for mode in modes if mode.startswith("transformers")), None)
    print(f"\n{'streams':>7} {'context':>7}  {'mode':<20} {'first token, s':>14} {'tokens/s':>9} {'spread':>15}"
          f" {'ratio':>6} {'of limit':>9}")  # fmt: skip
    for streams, context in CASES:
        tokens = streams * count
        medians = {m: statistics.median(t["rest"] for t in times[m, streams, context]) for m in workers}
        share = touched_share(config.num_experts, config.top_k, streams)
        for mode, worker in workers.items():
            seconds = [t["rest"] for t in times[mode, streams, context]]
            first = statistics.median(t["first"] for t in times[mode, streams, context])
            spread = f"{tokens / max(seconds):.1f}–{tokens / min(seconds):.1f}"
            ratio = f"{medians[baseline] / medians[mode]:.2f}" if baseline else ""
            limit = ""
            if worker.greeting:
                touched = worker.greeting["other_bytes"] + share * worker.greeting["routed_bytes"]
                limit = f"{count * touched / medians[mode] / bandwidth:.0%}"
            print(f"{streams:>7} {context:>7}  {mode:<20} {first:>14.2f} {tokens / medians[mode]:>9.1f} {spread:>15}"
                  f" {ratio:>6} {limit:>9}")  # fmt: skip
    for worker in workers.values():
        worker.close()


def measure_speculation(directory: Path, rounds: int, count: int) -> None:
    """A trained model on held-out beginnings of real documents: speed and acceptance with 0 to 3 drafted tokens."""
    from moestro.engine.engine import Engine
    from moestro.engine.language_model import load
    from moestro.engine.sequence import Request, SamplingParams

    m = load(directory)
    prompts = real_prompts(m.tokenizer)
    engines = {k: Engine(m.runtime, m.tokenizer, m.stop_ids, memory_bytes=2**28, draft_tokens=k) for k in range(4)}
    speeds: dict[int, list[float]] = {k: [] for k in engines}
    for _ in range(rounds):
        for k, engine in engines.items():
            seconds = tokens = 0.0
            for prompt in prompts:
                start = time.perf_counter()
                (completion,) = engine.run([Request(prompt, SamplingParams(max_tokens=count))])[0]
                seconds += time.perf_counter() - start
                tokens += len(completion.ids)
            speeds[k].append(tokens / seconds)
    config = m.config
    plain = statistics.median(speeds[0])
    runtime = engines[0].runtime
    print(f"{len(prompts)} prompts of real text, {count} tokens each, greedy, one stream")
    print(f"{'drafts':>6} {'tokens/s':>9} {'spread':>15} {'ratio':>6} {'bound by traffic':>17}  accepted per position")
    for k, values in speeds.items():
        stats = engines[k].stats()
        rates = [a / d if d else 0.0 for a, d in zip(stats.accepted, stats.drafted, strict=True)]
        # tokens per step over the bytes of a step, relative to one token a step
        gain, reach = 1.0, 1.0
        for rate in rates[:k]:
            reach *= rate
            gain += reach
        one, many = (
            runtime.other_bytes + touched_share(config.num_experts, config.top_k, n) * runtime.routed_bytes
            for n in (1, 1 + k)
        )
        bound = gain * one / many
        shown = " ".join(f"{rate:.0%}" for rate in rates[:k])
        print(f"{k:>6} {statistics.median(values):>9.1f} {f'{min(values):.0f}–{max(values):.0f}':>15}"
              f" {statistics.median(values) / plain:>6.2f} {bound:>17.2f}  {shown}")  # fmt: skip


def real_prompts(tokenizer: Any, each: int = 4, length: int = 96) -> list[list[int]]:
    """Beginnings of documents of every built-in domain."""
    from moestro.data.corpus import iterate_documents

    found: dict[str, list[list[int]]] = {}
    for document in iterate_documents("builtin"):
        chosen = found.setdefault(document.domain, [])
        if len(chosen) < each:
            ids = [tokenizer.bos_id, *tokenizer.encode(document.text[:2000])][:length]
            if len(ids) == length:
                chosen.append(ids)
    return [prompt for prompts in found.values() for prompt in prompts]


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--modes", default=";".join(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--mtp", type=Path, help="a trained model directory or run")
    options = parser.parse_args()
    if options.mtp:
        measure_speculation(options.mtp, options.rounds, options.tokens)
    else:
        compare(options.model, options.modes.split(";"), options.rounds, options.tokens)


if __name__ == "__main__":
    main()
