"""The runs behind docs/evidence.md: every cell trained by one `moestro compare`, a table and a figure a claim.

    python bench/evidence.py run  [--out runs/evidence] [--seeds 3] [--budget 500ktok] [--jobs 2]     an hour or two
    python bench/evidence.py show [--out runs/evidence] [--figures docs/figures]                     tables, figures

`run` goes on where it was stopped. Cells occur in several claims and are trained once. `show` works at any time on what
has finished. The built-in corpus, a tokenizer of 2048, a model of 128 × 4 layers whose FFN costs a token what a dense
one of 256 would; everything else is in the cells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FREE = "loss-free:router.bias_speed=0.01"
AUX = "loss-free:router.bias=none:router.balance="
V3 = "deepseek-v3:router.bias_speed=0.01"
CELLS = {
    "dense": "dense",
    "hash": "hash",
    "switch": "switch",
    "gshard": "gshard:moe_every=1",
    "deepseek-moe": "deepseek-moe",
    "no-shared": "deepseek-moe:num_shared_experts=0:top_k=8",
    "loss-free": FREE,
    "unbalanced": f"{AUX}[]",
    "aux-sequence": f'{AUX}[{{kind="sequence",weight=0.001}}]',
    "aux-batch": f'{AUX}[{{kind="expert",weight=0.001}}]',
    "aux-batch-10": f'{AUX}[{{kind="expert",weight=0.01}}]',
    "shazeer-0-0": "shazeer:router.balance=[]",
    "shazeer-0.2-0": 'shazeer:router.balance=[{kind="importance",weight=0.2}]',
    "shazeer-0-0.2": 'shazeer:router.balance=[{kind="load",weight=0.2}]',
    "shazeer-0.1-0.1": "shazeer",
    "switch-1.0": "switch:router.capacity.factor=1.0",
    "switch-2.0": "switch:router.capacity.factor=2.0",
    "gshard-1.25": "gshard:moe_every=1:router.capacity.factor=1.25",
    "gshard-2.0": "gshard:moe_every=1:router.capacity.factor=2.0",
    "mla": V3,
    "mha": f"{V3}:attention=mha",
    "gqa": f"{V3}:attention=gqa:num_kv_heads=2",
    "mqa": f"{V3}:attention=mqa",
    "mtp-1": f"{V3}:mtp_depth=1",
    "mtp-2": f"{V3}:mtp_depth=2",
}
SETTINGS = (
    *("model.dense_dim=256", "train.seq_len=128", "train.batch_size=8", "train.lr=4e-3", "train.eval_tokens=4096"),
    "data.valid_fraction=0.01",
)


@dataclass(frozen=True)
class Claim:
    """One item of the evidence: the cells it compares, the first being what the others are held against."""

    title: str
    cells: tuple[str, ...]
    columns: tuple[str, ...] = ("max_vio_batch", "max_vio_global", "dropped")


CLAIMS = {
    "order": Claim(
        "Dense > Hash > Switch > GShard > DeepSeekMoE at equal active compute, and the shared expert",
        ("dense", "hash", "switch", "gshard", "deepseek-moe", "no-shared"),
        ("tokens_per_second", "max_vio_global", "dropped"),
    ),
    "balance": Claim(
        "Loss-free balancing against auxiliary losses",
        ("loss-free", "unbalanced", "aux-sequence", "aux-batch", "aux-batch-10"),
        ("max_vio_batch", "max_vio_global", "entropy"),
    ),
    "shazeer": Claim(
        "Importance and load losses",
        ("shazeer-0-0", "shazeer-0.2-0", "shazeer-0-0.2", "shazeer-0.1-0.1"),
        ("load_cv", "max_over_mean", "dead_experts"),
    ),
    "capacity": Claim(
        "Capacity factors",
        ("switch-1.0", "switch", "switch-2.0", "gshard", "gshard-1.25", "gshard-2.0"),
        ("dropped", "max_vio_batch", "tokens_per_second"),
    ),
    "attention": Claim(
        "MLA against MHA, GQA, MQA", ("mla", "mha", "gqa", "mqa"), ("cache_bytes_per_token", "tokens_per_second")
    ),
    "mtp": Claim("Multi-token prediction", ("mla", "mtp-1", "mtp-2"), ("mtp_agreement", "tokens_per_second")),
}


def command(out: Path, seeds: int, budget: str, jobs: int) -> list[str]:
    """The one `moestro compare` that trains everything."""
    cells = ",".join(f"{label}={spec}" if label != spec else label for label, spec in CELLS.items())
    settings = [part for pair in SETTINGS for part in ("--set", pair)]
    sizes = ["--seeds", str(seeds), "--budget", budget, "--jobs", str(jobs)]
    return [sys.executable, "-m", "moestro", "compare", "--routers", cells, *sizes, *settings, "--out", str(out)]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="500ktok")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    if options.action == "run":
        sys.exit(subprocess.run(command(options.out, options.seeds, options.budget, options.jobs)).returncode)


if __name__ == "__main__":
    main()
