"""`moestro chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from moestro.cli.output import print_note, read_input
from moestro.cli.process import Activations, Cache, Dtype, IgnoreKeys, Threads, Weights, split_names, use_threads


def chat(
    model: Path,
    *,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    dtype: Dtype = "auto",
    weights: Weights = None,
    cache: Cache = "auto",
    activations: Activations = "auto",
    ignore_config_keys: IgnoreKeys = None,
    threads: Threads = 0,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends, Ctrl-C stops a reply, /new starts over.

    Parameters
    ----------
    model
        A run, a checkpoint, a Hugging Face deepseek_v3 or deepseek_v2 directory, or packed weights.
    system
        A first message that says how to behave.
    max_tokens
        Most tokens in a reply.
    temperature
        0 takes the likeliest token; 1 samples the model's own distribution.
    top_p
        Sample from the smallest set of tokens with this much probability.
    seed
        The same seed and messages give the same replies.
    """
    from moestro.engine.conversation import Conversation
    from moestro.engine.language_model import load

    use_threads(threads)
    keys = split_names(ignore_config_keys)
    beginning = [{"role": "system", "content": system}] if system else []
    conversation = Conversation(
        load(model, dtype, weights=weights, cache=cache, activations=activations, ignore_config_keys=keys),
        max_tokens,
        temperature,
        top_p,
        seed,
        list(beginning),
    )
    if sys.stdin.isatty():
        print_note("An empty line or Ctrl-D ends, Ctrl-C stops a reply, /new starts over.")
        print_note("A model trained on plain text alone continues your text rather than answering it.")
    while text := read_line():
        if text == "/new":
            conversation.messages = list(beginning)
            continue
        try:
            for piece in conversation.reply(text):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print_note("\n(stopped)")
        print()


def read_line() -> str:
    """The next line without spaces around it; empty at the end of input."""
    try:
        return read_input(lambda: input("> " if sys.stdin.isatty() else "")).strip()
    except EOFError:
        return ""
