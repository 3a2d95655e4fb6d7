"""The demo's bits per byte beside a dense model of equal active size trained for the same time, and beside xz -9e.

    python bench/demo.py [--minutes 5] [--out runs/bench-demo]

Both models have the demo preset's width, depth, attention, MTP and data; the dense one's feed-forward layers are as
wide as the experts a token meets together. They are trained one after the other, each alone on the machine. xz is given
twice: the held-out text alone, and what it adds to the training text (a compressor that has seen the same text).
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from moestro.config import build_config, load_preset
from moestro.data.shards import ShardSet, open_shards
from moestro.data.tokenizer import Tokenizer
from moestro.machine import describe_machine, keep_freed_memory, use_threads
from moestro.model.size import measure_size
from moestro.training.loop import train
from moestro.training.metrics import latest_evaluation, read_metrics


def dense_twin(tree: dict[str, Any]) -> dict[str, Any]:
    """The demo without experts: every feed-forward as wide, on average, as what a token meets."""
    model = tree["model"]
    layers, dense = model["num_layers"], model.get("num_dense_layers", 1)
    met = (model["top_k"] + model["num_shared_experts"]) * model["expert_dim"]
    width = round((dense * model["dense_dim"] + (layers - dense) * met) / layers)
    return tree | {"model": model | {"num_experts": 0, "num_shared_experts": 0, "dense_dim": width}}


def compress(text: bytes) -> int:
    """Bytes that xz -9e needs."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def xz_bits(shards: ShardSet, tokenizer: Tokenizer, domain: str) -> tuple[float, float]:
    """Bits per byte of the held-out text: alone, and on top of the training text."""
    train_text, valid_text = (
        tokenizer.decode(np.asarray(shards.tokens(domain, split)).tolist()).encode() for split in ("train", "valid")
    )
    added = compress(train_text + valid_text) - compress(train_text)
    return 8 * compress(valid_text) / len(valid_text), 8 * added / len(valid_text)


def main() -> None:
    """Train both, compress, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-demo"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    use_threads()
    keep_freed_memory()
    tree = load_preset("demo")
    scores: dict[str, dict[str, float]] = {}
    for name, variant in (("moe", tree), ("dense", dense_twin(tree))):
        config = build_config(variant, [f"train.minutes={options.minutes}", *options.overrides])
        run = options.out / name
        train(config, run, resume=(run / "settings.json").exists())
        size, last, final = measure_size(config.model), read_metrics(run)[-1], latest_evaluation(run)
        print(
            f"{name}: {size.total / 1e6:.2f}M parameters, {size.active / 1e6:.2f}M active; {last['step']} steps, "
            f"{last['tokens'] / 1e6:.2f}M tokens, {last['seconds']:.0f} s, MaxVio {last['max_vio']:.2f}, "
            f"dead {last['dead_experts']}, MTP agreement {last['mtp_agreement']:.0%}"
        )
        scores[name] = {domain: score["bits_per_byte"] for domain, score in final["domains"].items()}
        scores[name]["all"] = final["bits_per_byte"]
    data = options.out / "moe" / "data"
    shards, tokenizer = open_shards(data / "shards"), Tokenizer.from_file(data / "tokenizer.json")
    print(f"\n{describe_machine().cpu}")
    print(f"{'domain':<12} {'MoE':>6} {'dense':>6} {'xz alone':>9} {'xz after training text':>23}")
    for domain in shards.domains:
        alone, after = xz_bits(shards, tokenizer, domain)
        print(
            f"{domain:<12} {scores['moe'][domain]:>6.3f} {scores['dense'][domain]:>6.3f} {alone:>9.3f} {after:>23.3f}"
        )
    print(f"{'all':<12} {scores['moe']['all']:>6.3f} {scores['dense']['all']:>6.3f}")


if __name__ == "__main__":
    main()
