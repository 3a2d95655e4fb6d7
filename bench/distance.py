"""How far the served pass is from the trained one: log-probabilities and routes of the same weights on the same text.

    python bench/distance.py                 # the demo preset with random weights
    python bench/distance.py --model DIR     # a run, a checkpoint or a Hugging Face directory
    python bench/distance.py --formats int8  # one format only

The trained pass attends in the naive form over whole sequences, the served one in the absorbed form over pages, with
packed weights. fp32 weights are served with activations in fp32, all others with activations in bf16; the trained pass
computes in the precision of the activations. Printed are, over all tokens of the built-in text,

    mean, largest  |Δ log p| of the next token of the text, in nats: what an importance ratio is off by in RL
    KL             Σ p (log p − log q) over the vocabulary, of the served q from the trained p, mean
    routes         of the choices of experts, the share that both passes make
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moestro.checkpoints.random_weights import write_random_model
from moestro.config import ModelConfig, load_preset
from moestro.data.builtin_corpus import DOMAINS, iterate_builtin
from moestro.data.tokenizer import Tokenizer
from moestro.engine.language_model import load
from moestro.engine.paged_cache import PagedCache
from moestro.engine.runtime import Runtime
from moestro.engine.scheduler import pages_for
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer
from moestro.ops.serving.formats import FORMATS


@dataclass
class Distance:
    """Of N tokens and C choices of experts: |Δ log p| [N], KL [N], and how many choices are equal."""

    changes: list[Tensor]
    divergences: list[Tensor]
    equal: int = 0
    choices: int = 0

    def describe(self) -> str:
        """The columns of the table."""
        changes, divergences = torch.cat(self.changes), torch.cat(self.divergences)
        routes = f"{self.equal / self.choices:.4f}" if self.choices else "–"
        mean, largest, divergence = float(changes.mean()), float(changes.max()), float(divergences.mean())
        return f"{mean:>9.2g} {largest:>9.2g} {divergence:>9.2g} {routes:>8}"


def read_texts(tokenizer: Tokenizer, count: int, length: int) -> Iterator[list[int]]:
    """The first `count` documents of each domain that have `length` tokens, cut there."""
    left = dict.fromkeys(DOMAINS, count)
    for document in iterate_builtin():
        if left[document.domain]:
            ids = [tokenizer.bos_id, *tokenizer.encode(document.text[: 16 * length])][:length]
            if len(ids) == length:
                left[document.domain] -= 1
                yield ids


@torch.inference_mode()
def measure(model: Transformer, runtime: Runtime, texts: list[list[int]]) -> Distance:
    """Both passes over each text."""
    found = Distance([], [])
    for ids in texts:
        tokens, pages = torch.tensor(ids), range(pages_for(len(ids)))
        cache = PagedCache(runtime.config, len(pages), runtime.dtype)
        served = runtime.forward(cache.prepare([(ids, 0, pages)]), cache)
        trained = model(tokens, AttentionBatch.causal(1, len(ids)))
        log_q = runtime.logits(served.hidden)[:-1].log_softmax(-1)
        log_p = model.logits(trained.hidden)[:-1].float().log_softmax(-1)
        found.changes.append((log_q - log_p).gather(1, tokens[1:, None]).abs().flatten())
        found.divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        for ours, routes in zip(served.ids, trained.routes, strict=True):
            found.equal += int((ours[..., None] == routes.ids[..., None, :]).any(-1).sum())
            found.choices += ours.numel()
    return found


def main() -> None:
    """Read the command line and print a row for every format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--texts", type=int, default=2, help="documents of each domain")
    parser.add_argument("--length", type=int, default=512, help="tokens of each document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder) / "random"
        if options.model is None:
            config = ModelConfig(**(load_preset("demo")["model"] | {"vocab_size": 8192, "init_std": 0.1}))
            write_random_model(config, path, seed=0, dtype="fp32")
        print(f"{'weights':<8} {'compute':<8} {'mean':>9} {'largest':>9} {'KL':>9} {'routes':>8}")
        for name in options.formats:
            compute = "fp32" if name == "fp32" else "bf16"
            held = load(path, compute, weights=name)
            length = min(options.length, held.config.max_seq_len)
            texts = list(read_texts(held.tokenizer, options.texts, length))
            print(f"{name:<8} {compute:<8} {measure(held.model, held.runtime, texts).describe()}", flush=True)


if __name__ == "__main__":
    main()
