"""Whether the tensors of a directory can be those of its config.json, judged from names and shapes before anything is
built, so that a wrong number in config.json costs milliseconds and not memory."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

from moestro.checkpoints.stored import Header
from moestro.config import ModelConfig
from moestro.errors import CheckpointError

LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(eh_proj\.)?")
EXPERT = re.compile(r"\.mlp\.experts\.(?:(\d{1,7})\.|gate_up_proj)")
CODES_PER_WORD = 8  # of 4 bits in an I32


def fit_config(config: ModelConfig, headers: Mapping[str, Header]) -> tuple[ModelConfig, list[str]]:
    """The configuration with as many MTP modules as the files have, and a notice if that is another number.

    CheckpointError if the files hold other numbers of layers or experts, or are too small for the matrices.
    """
    config, notices = fit_layers(config, headers)
    check_experts(config, headers)
    check_sizes(config, headers)
    return config, notices


def fit_layers(config: ModelConfig, headers: Mapping[str, Header]) -> tuple[ModelConfig, list[str]]:
    """See `fit_config`. MTP modules are stored as layers after the last, each with a projection `eh_proj`."""
    found = [match for name in headers if (match := LAYER.match(name))]
    layers = {int(match[1]) for match in found}
    modules = {int(match[1]) for match in found if match[2]}
    beyond = {layer for layer in layers if layer >= config.num_layers}
    held = len(layers) - len(beyond)
    if held < config.num_layers:
        first = next(layer for layer in itertools.count() if layer not in layers)
        raise CheckpointError(
            f"config.json describes {config.num_layers} layers, but the files hold {held} of them: "
            f"layer {first} is the first that is missing"
        )
    if not beyond <= modules:
        raise CheckpointError(f"config.json describes {config.num_layers} layers, but the files hold {len(layers)}")
    depth = len(beyond)
    if depth == config.mtp_depth:
        return config, []
    notice = f"config.json names {config.mtp_depth} MTP modules, and the files hold {depth}: {depth} are used"
    return config.model_copy(update={"mtp_depth": depth}), [notice]


def check_experts(config: ModelConfig, headers: Mapping[str, Header]) -> None:
    """Refuse another number of experts."""
    if not config.num_experts or not config.num_moe_layers:
        return
    count = 0
    for name, header in headers.items():
        if found := EXPERT.search(name):
            count = max(count, int(found[1]) + 1 if found[1] else header.shape[0] if header.shape else 0)
    if count != config.num_experts:
        raise CheckpointError(
            f"config.json describes {config.num_experts} routed experts a layer, but the files hold {count or 'none'}"
        )


def check_sizes(config: ModelConfig, headers: Mapping[str, Header]) -> None:
    """Refuse a matrix larger than all files together."""
    held = sum(math.prod(h.shape) * (CODES_PER_WORD if h.dtype == "I32" else 1) for h in headers.values())
    heads = config.num_heads
    matrices = {
        "the embedding": (config.vocab_size, config.hidden_dim),
        "the queries": (heads * (config.nope_dim + config.rope_dim), config.q_lora_rank or config.hidden_dim),
        "the output of attention": (heads * config.v_dim, config.hidden_dim),
    }
    if config.attention == "mla":
        matrices["keys and values"] = (heads * (config.nope_dim + config.v_dim), config.kv_lora_rank)
        matrices["latents"] = (config.kv_lora_rank + config.rope_dim, config.hidden_dim)
    if config.num_moe_layers:
        matrices["an expert"] = (config.expert_dim * max(config.num_shared_experts, 1), config.hidden_dim)
    if len(config.moe_layers) < config.num_layers:
        matrices["a dense layer"] = (config.dense_dim, config.hidden_dim)
    for what, (rows, columns) in matrices.items():
        if rows * columns > held:
            raise CheckpointError(
                f"config.json describes {what} as {rows:,} x {columns:,} values, but all files together hold {held:,}"
            )
