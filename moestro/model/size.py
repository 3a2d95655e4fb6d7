"""What a model costs, from its configuration alone: parameters, arithmetic, cache and weight bytes.

Parameters are counted on a model built on the meta device, so that the count cannot drift from the code. A multiply-add
is two flops. The counts are checked against the published figures of DeepSeek-V2 and V3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moestro.config import ModelConfig
from moestro.model.attention import list_caches
from moestro.model.transformer import Transformer

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Size:
    """Parameter counts. `total` and `active` count the main model with both embeddings, `mtp` what the MTP modules add,
    `routed` all routed experts of the main model."""

    total: int
    active: int
    embedding: int
    routed: int
    mtp: int
    mtp_active: int

    @property
    def active_without_embedding(self) -> int:
        """`active` without the input embedding, which is a look-up, not arithmetic."""
        return self.active - self.embedding


def measure_size(config: ModelConfig) -> Size:
    """Count the parameters of `config`."""
    with torch.device("meta"):
        model = Transformer(config)
    tensors = [*model.named_parameters(), *model.named_buffers()]  # the buffers are the routers' biases
    counts = {name: tensor.numel() for name, tensor in tensors}
    mtp = sum(n for name, n in counts.items() if name.startswith("mtp."))
    total = sum(counts.values()) - mtp
    expert = 3 * config.hidden_dim * config.expert_dim
    idle = (config.num_experts - config.top_k) * expert if config.num_experts else 0
    moe_layers = len(config.moe_layers)
    return Size(
        total=total,
        active=total - moe_layers * idle,
        embedding=config.vocab_size * config.hidden_dim,
        routed=moe_layers * config.num_experts * expert,
        mtp=mtp,
        mtp_active=mtp - (config.mtp_depth * idle),
    )


def attention_flops(config: ModelConfig, context: int) -> int:
    """Flops per token for scores and mixing in all layers, naive form, attending to `context` tokens."""
    per_pair = 2 * (config.nope_dim + config.rope_dim + config.v_dim)
    return config.num_layers * config.num_heads * per_pair * context


def forward_flops(config: ModelConfig, context: int = 0) -> int:
    """Flops for one token through the main model, attending to `context` tokens."""
    size = measure_size(config)
    matrices = size.active if config.tie_embeddings else size.active_without_embedding
    return 2 * matrices + attention_flops(config, context)


def training_flops(config: ModelConfig, seq_len: int) -> int:
    """Flops per trained token: forward and twice that backward, causal attention over `seq_len`."""
    return 3 * forward_flops(config, seq_len // 2)


def cache_bytes_per_token(config: ModelConfig) -> dict[str, int]:
    """Bytes per cached token over all layers, per precision."""
    kinds = {"fp32": (torch.float32, "auto"), "bf16": (torch.bfloat16, "auto")}
    if config.attention == "mla":
        kinds["fp8"] = (torch.bfloat16, "fp8")
    return {
        name: sum(
            spec.count_bytes(dtype) for specs in list_caches(config, cache)[: config.num_layers] for spec in specs
        )
        for name, (dtype, cache) in kinds.items()
    }


def describe_size(config: ModelConfig) -> dict[str, Any]:
    """Everything that `moestro inspect` shows, as JSON."""
    size = measure_size(config)
    return {
        "parameters": {
            "total": size.total,
            "active": size.active,
            "active_without_input_embedding": size.active_without_embedding,
            "routed_experts": size.routed,
            "mtp": size.mtp,
            "mtp_active": size.mtp_active,
        },
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "weight_bytes": {name: (size.total + size.mtp) * width for name, width in BYTES.items()},
        "flops_per_token": forward_flops(config),
        "training_flops_per_token": training_flops(config, min(4096, config.max_seq_len)),
        "model": config.model_dump(mode="json"),
    }
