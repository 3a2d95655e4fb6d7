"""`moestro generate`: continue a text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moestro.cli.output import print_json, read_input
from moestro.cli.process import Activations, Cache, Dtype, IgnoreKeys, Threads, Weights, split_names, use_threads


def generate(
    model: Path,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Dtype = "auto",
    weights: Weights = None,
    cache: Cache = "auto",
    activations: Activations = "auto",
    ignore_config_keys: IgnoreKeys = None,
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Continue a prompt; greedy unless a temperature is given.

    Parameters
    ----------
    model
        A run, a checkpoint, a Hugging Face deepseek_v3 or deepseek_v2 directory, or packed weights.
    prompt
        The beginning of a text; "-" reads it from standard input.
    max_tokens
        Most tokens to write.
    temperature
        0 takes the likeliest token; 1 samples the model's own distribution.
    top_p
        Sample from the smallest set of tokens with this much probability.
    seed
        The same seed gives the same text.
    json_output
        Print one JSON object: text, tokens, finish_reason, tokens_per_second.
    """
    from moestro.engine.language_model import load

    if prompt == "-":
        prompt = read_input(sys.stdin.read)
    use_threads(threads)
    keys = split_names(ignore_config_keys)
    language_model = load(model, dtype, weights=weights, cache=cache, activations=activations, ignore_config_keys=keys)
    start = time.perf_counter()
    written = language_model.generate(prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    seconds = time.perf_counter() - start
    if not json_output:
        print(prompt + written.text)
        return
    print_json(
        {
            "text": written.text,
            "tokens": len(written.ids),
            "ids": written.ids,
            "finish_reason": written.finish_reason,
            "prompt_tokens": len(language_model.tokenizer.encode(prompt)) + 1,
            "tokens_per_second": len(written.ids) / seconds,
        }
    )
