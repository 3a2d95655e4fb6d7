"""What a model needs to be served, and how fast it could write at best: from its shapes, before anything is loaded.

Memory is counted by part. Weights and cache are exact: what `pack_model` makes, and pages of 64 tokens. The working
memory is an estimate. The speed is an upper bound: writing a token reads every active weight and the cached rows of
its context once, so it takes at least those bytes divided by the speed of memory. Arithmetic, the sampler and all that
is not decoding come on top; several requests at once share the reading of weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from moestro import machine
from moestro.checkpoints.packing import Source, packed_bytes
from moestro.config import ModelConfig
from moestro.engine.paged_cache import page_bytes
from moestro.engine.scheduler import LEAST_BUDGET, pages_for
from moestro.model.parts import served_parts
from moestro.model.size import cache_bytes_per_token

LOGIT_ROWS = 64  # rows whose logits are in memory at a time: one for each running request


@dataclass(frozen=True)
class ServingNeeds:
    """Bytes of each part, and `read`, those that writing one token reads; `private`: weights are not mapped files."""

    format: str
    weights: int
    cache: int
    working: int
    read: int
    private: bool = True

    @property
    def total(self) -> int:
        """Memory of all parts."""
        return self.weights + self.cache + self.working

    def fits(self, usable: int) -> bool:
        """Whether `usable` bytes of memory suffice; mapped weights may be larger than memory, which is slow."""
        return self.total - (0 if self.private else self.weights) <= usable

    def most_tokens_per_second(self, bytes_per_second: float) -> float:
        """The upper bound of decoding one text; only for what is larger than the caches, which are faster."""
        return bytes_per_second / self.read

    def describe(self, usable: int, bytes_per_second: float | None) -> dict[str, object]:
        """All of it as JSON."""
        is_cached = self.read <= machine.last_cache_bytes()
        speed = None if bytes_per_second is None or is_cached else self.most_tokens_per_second(bytes_per_second)
        return {**asdict(self), "total": self.total, "fits": self.fits(usable), "most_tokens_per_second": speed}


def serving_needs(
    model: Source | ModelConfig,
    format: str,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    private: bool = True,
) -> ServingNeeds:
    """The needs of a model with one text of `context` tokens; `dtype` of activations counts for a configuration."""
    config = model if isinstance(model, ModelConfig) else model.config
    dtype = dtype if isinstance(model, ModelConfig) else model.dtype
    sizes = packed_bytes(model, format, dtype)
    return ServingNeeds(
        format=format,
        weights=sum(sizes.values()),
        cache=pages_for(context) * page_bytes(config, dtype),
        working=working_bytes(config, dtype),
        read=active_bytes(config, sizes) + context * cache_bytes_per_token(config)[_name(dtype)],
        private=private,
    )


def active_bytes(config: ModelConfig, sizes: dict[str, int]) -> int:
    """Of the bytes of parts, those that writing one token reads: of experts a token's share, of the embedding a row."""
    share = {"experts": config.top_k / max(config.num_experts, 1)}
    total = 0.0
    for part in served_parts(config):
        if part.name.startswith("mtp."):
            continue
        of_part = 1 / config.vocab_size if part.name == "embed.weight" else share.get(part.form, 1.0)
        total += sizes[part.name] * of_part
    return round(total)


def working_bytes(config: ModelConfig, dtype: torch.dtype, rows: int = LEAST_BUDGET) -> int:
    """About what a step of `rows` tokens takes beside weights and cache: values inside a block, and logits."""
    heads, hidden = config.num_heads, config.hidden_dim
    if config.attention == "mla":
        row = config.kv_lora_rank + config.rope_dim
        attention = heads * (2 * (config.nope_dim + config.rope_dim) + row + config.kv_lora_rank + config.v_dim)
        attention += 2 * row + config.q_lora_rank * 2 + hidden
    else:
        attention = heads * 3 * (config.nope_dim + config.rope_dim) + heads * config.v_dim + hidden
    shared = config.expert_dim * config.num_shared_experts
    feed_forward = max(3 * config.dense_dim, 3 * shared + 2 * config.num_experts + hidden) + 2 * hidden
    values = rows * (2 * hidden + max(attention, feed_forward))
    return values * dtype.itemsize + LOGIT_ROWS * config.vocab_size * 4


def _name(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"
