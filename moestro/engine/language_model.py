"""A model with its tokenizer, loaded from a directory and ready to write text.

`load` takes a run, a checkpoint of one, or any Hugging Face `deepseek_v3` directory. Generation computes the prompt
once, then one token a step over the latent cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro.data.tokenizer import Tokenizer
from moestro.engine.latent_cache import new_cache
from moestro.engine.sampler import Sampler
from moestro.errors import CheckpointError, ConfigError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer
from moestro.model.weights import DTYPES, load_model, read_json


@dataclass(frozen=True)
class Generation:
    """The continuation of a prompt: `text` and `ids` without the prompt; `finish_reason` is "stop" or "length"."""

    text: str
    ids: list[int]
    finish_reason: str


class LanguageModel:
    """Model, tokenizer, and the ids that end a text."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids

    def stream_ids(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield token ids after `prompt` until a stop id (yielded last) or `max_tokens`."""
        config = self.model.config
        if not prompt:
            raise ConfigError("the prompt is empty")
        if max_tokens < 1:
            raise ConfigError(f"max-tokens must be at least 1, not {max_tokens}")
        if len(prompt) + max_tokens > config.max_seq_len:
            raise ConfigError(
                f"prompt ({len(prompt)} tokens) and max-tokens ({max_tokens}) exceed the model's {config.max_seq_len}"
            )
        if max(prompt) >= config.vocab_size or min(prompt) < 0:
            raise ConfigError(f"the prompt has token ids outside the vocabulary of {config.vocab_size}")
        sampler = Sampler(temperature, top_p, seed)
        cache = new_cache(config, self.model.dtype)
        tokens, position = list(prompt), 0
        for _ in range(max_tokens):
            with torch.inference_mode():
                batch = AttentionBatch.causal(1, len(tokens), first_position=position)
                hidden = self.model(torch.tensor(tokens), batch, cache).hidden[-1]
                token = sampler.choose(self.model.logits(hidden))
            position += len(tokens)
            tokens = [token]
            yield token
            if token in self.stop_ids:
                return

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generation:
        """Continue a text (a document begins before it) or token ids. Greedy by default."""
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        stream = self.stream_ids(ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        written = list(stream)
        stopped = bool(written) and written[-1] in self.stop_ids
        text = self.tokenizer.decode(written[:-1] if stopped else written)
        return Generation(text, written, "stop" if stopped else "length")


def find_model_directory(path: Path) -> Path:
    """The model directory that `path` means: the newest checkpoint of a run, or itself."""
    checkpoints = sorted(d for d in (path / "checkpoints").glob("step-*") if d.suffix != ".tmp")
    if checkpoints:
        return checkpoints[-1]
    if (path / "config.json").is_file():
        return path
    if (path / "run.json").is_file():
        raise CheckpointError(f"{path} is a run without a checkpoint yet")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run, a checkpoint or a Hugging Face model directory")
    raise CheckpointError(f"{path} is neither a run with a checkpoint nor a model directory (no config.json)")


def load(path: str | Path, dtype: str = "auto") -> LanguageModel:
    """Load a run, a checkpoint or a Hugging Face directory; `dtype` is auto (as stored), fp32 or bf16."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be auto, fp32 or bf16, not '{dtype}'")
    directory = find_model_directory(Path(path))
    model = load_model(directory, DTYPES.get(dtype))
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    return LanguageModel(model, tokenizer, _stop_ids(directory, tokenizer))


def _stop_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """End-of-sequence ids of the generation config and the tokenizer."""
    path = directory / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.exists() else None
    ids = listed if isinstance(listed, list) else [listed]
    return frozenset([tokenizer.eos_id, *(i for i in ids if isinstance(i, int))])
