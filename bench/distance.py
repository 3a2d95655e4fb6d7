"""How far the served pass is from the trained one: log-probabilities and routes of the same weights on the same text.

    python bench/distance.py                 # the demo preset with random weights
    python bench/distance.py --model DIR     # a run, a checkpoint or a Hugging Face directory
    python bench/distance.py --formats int8  # one format only

The trained pass attends in the naive form over whole sequences, the served one in the absorbed form over pages, with
packed weights. fp32 weights are served with activations in fp32, all others with activations in bf16; the trained pass
computes in the precision of the activations. Printed are, over all tokens of the built-in text,

    mean, largest  |Δ log p| over the vocabulary, in nats: what an importance ratio is off by in RL
    KL             Σ p (log p − log q) over the vocabulary, of the served q from the trained p, mean
    routes         of the choices of experts, the share that both passes make

and the first three again where the served pass replays the routes of the trained one, so that no token meets others.
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
    """Sums over tokens, and how many of the choices of experts are equal."""

    tokens: int = 0
    change: float = 0.0
    largest: float = 0.0
    divergence: float = 0.0
    equal: int = 0
    choices: int = 0

    def add(self, log_p: Tensor, log_q: Tensor) -> None:
        """Log-probabilities [N, V] of the trained and the served pass."""
        changes = (log_p - log_q).abs()
        self.tokens += len(log_p)
        self.change += float(changes.mean(-1).sum())
        self.largest = max(self.largest, float(changes.max()))
        self.divergence += float((log_p.exp() * (log_p - log_q)).sum())

    def add_routes(self, ours: Tensor, theirs: Tensor) -> None:
        """Expert ids [L, N, A] in any order."""
        self.equal += int((ours[..., None] == theirs[..., None, :]).any(-1).sum())
        self.choices += ours.numel()

    def describe(self) -> str:
        """Columns of the table."""
        return f"{self.change / self.tokens:>9.2g} {self.largest:>9.2g} {self.divergence / self.tokens:>9.2g}"


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
def measure(model: Transformer, runtime: Runtime, texts: list[list[int]]) -> tuple[Distance, Distance]:
    """Both passes over each text: with the routes of each, and with those of the trained one in both."""
    free, replayed = Distance(), Distance()
    for ids in texts:
        pages = range(pages_for(len(ids)))
        cache = PagedCache(runtime.config, len(pages), runtime.dtype)
        step = cache.prepare([(ids, 0, pages)])
        trained = model(torch.tensor(ids), AttentionBatch.causal(1, len(ids)), logits=True)
        routes = torch.stack([chosen.ids for chosen in trained.routes]) if trained.routes else None
        log_p = trained.logits.float().log_softmax(-1)
        for found, given in ((free, None), (replayed, routes)):
            served = runtime.forward(step, cache, given)
            found.add(log_p, runtime.logits(served.hidden).log_softmax(-1))
            if routes is not None:
                found.add_routes(served.ids, routes)
    return free, replayed


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
        columns = f"{'mean':>9} {'largest':>9} {'KL':>9}"
        print(f"{'weights':<8} {'compute':<8} {columns} {'routes':>8}   {'replayed: ' + columns.strip():>32}")
        for name in options.formats:
            compute = "fp32" if name == "fp32" else "bf16"
            held = load(path, compute, weights=name)
            length = min(options.length, held.config.max_seq_len)
            texts = list(read_texts(held.tokenizer, options.texts, length))
            free, replayed = measure(held.model, held.runtime, texts)
            routes = f"{free.equal / free.choices:.4f}" if free.choices else "–"
            print(f"{name:<8} {compute:<8} {free.describe()} {routes:>8}   {replayed.describe():>32}", flush=True)


if __name__ == "__main__":
    main()
