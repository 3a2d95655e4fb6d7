"""Sizes: bytes as people write them, and one dial for the size of a model.

`tree_of_depth`: a depth gives a whole configuration that trains sensibly.

Width grows with depth (64 per layer), heads are 64 wide, fine-grained experts are half as wide as the model, and the
learning rate falls with √width, as in the shipped presets. The number of steps follows from 8 tokens per active
parameter, and from the text (`training/plan.py`). That is less than the optimum in FLOPs (about 20, arXiv 2203.15556):
on the intended machines products of a wider model run nearer to the peak, so that in time the optimum lies at larger
models.
"""

from __future__ import annotations

import re
from typing import Any

from moestro.errors import ConfigError

MIN_DEPTH, MAX_DEPTH = 2, 48
TOKENS_PER_PARAMETER = 8
DEFAULT_MINUTES = 30.0  # of training on a text of one's own: enough for words and short sentences, short enough to wait
MIN_STEPS = 200  # fewer teach nothing
BYTES_FORM = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?(?:([kmgt])(i?b)?|b)?")
BYTES_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def parse_bytes(text: str) -> int:
    """`4GiB`, `4 GiB`, `4G` and `4g` (of 1024), `512MB` (of 1000), `1000000`, `7B` to bytes; ConfigError for others."""
    found = BYTES_FORM.fullmatch(text.strip().lower())
    number, prefix, suffix = found.groups() if found else ("0", None, None)
    size = int(float(number) * (1000 if suffix == "b" else 1024) ** " kmgt".index(prefix or " "))
    if not size:
        raise ConfigError(f"memory is a size such as 4GiB, not '{text}'")
    return size


def format_bytes(size: float) -> str:
    """12,345,678 bytes as 12.35 MB, of 1000."""
    unit, scale = next(((unit, scale) for unit, scale in BYTES_UNITS if size >= scale), BYTES_UNITS[-1])
    return f"{size / scale:,.2f} {unit}"


def tree_of_depth(depth: int) -> dict[str, Any]:
    """The raw configuration of `depth` layers; ConfigError outside 2…48."""
    if not MIN_DEPTH <= depth <= MAX_DEPTH:
        raise ConfigError(f"depth must lie between {MIN_DEPTH} and {MAX_DEPTH}, not {depth}")
    hidden = 64 * depth
    large = depth >= 8
    model = {
        "hidden_dim": hidden,
        "num_layers": depth,
        "dense_dim": round(hidden * 8 / 3 / 32) * 32,
        "num_heads": max(hidden // 64, 2),
        "kv_lora_rank": max(hidden // 4, 32),
        "q_lora_rank": hidden // 2 if depth >= 24 else 0,
        "num_experts": 64 if large else 32,
        "top_k": 6 if large else 4,
        "expert_dim": max(hidden // 2 // 32 * 32, 32),
        "mtp_depth": 1,
        "max_seq_len": 2048,
        "router": {"scale": 2.446 if large else 2.0},
    }
    seq_len, sequences = (512, 16) if large else (256, 16)
    train = {
        "seq_len": seq_len,
        "batch_size": sequences,
        "accumulate": 4 if large else 1,
        "lr": round(3e-3 * (192 / hidden) ** 0.5, 6),
        "warmup_steps": 50,
    }
    train["steps"] = max(
        active_parameters(model) * TOKENS_PER_PARAMETER // (seq_len * sequences * train["accumulate"]), MIN_STEPS
    )
    return {"model": model, "train": train}


def active_parameters(model: dict[str, Any]) -> int:
    """Parameters of the block matrices that a token uses: close enough for a schedule, without building the model."""
    hidden, layers = model["hidden_dim"], model["num_layers"]
    attention = 4 * hidden * hidden
    experts = 3 * hidden * model["expert_dim"] * (model["top_k"] + 1)
    count: int = layers * (attention + experts)
    return count
