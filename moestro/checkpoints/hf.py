"""Writing config.json, and the tensor names of Hugging Face's `deepseek_v3` and `deepseek_v2`.

A model that Hugging Face's `DeepseekV3ForCausalLM` or `DeepseekV2ForCausalLM` can run is written as such. Any other
(dense, MHA, capacity …) is written as `model_type: moestro`, with Moestro's own config under the key `moestro` and the
same tensor names where they exist. MTP modules follow as layers `num_hidden_layers + k`, as DeepSeek ships them.

Accounting is strict: an unused tensor is an error, and so is a parameter that nothing fills. `hf_config.py` reads
config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moestro.checkpoints.families import ARCHITECTURES, PLAIN_KEYS
from moestro.config import ModelConfig
from moestro.scores import SCORES

# keys that every config.json written here has
COMMON_KEYS: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1, "pretraining_tp": 1,
    "output_router_logits": False,
}  # fmt: skip
WRITTEN_KEYS: dict[str, dict[str, Any]] = {
    "deepseek_v3": COMMON_KEYS | {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": COMMON_KEYS | {"scoring_func": "softmax", "mlp_bias": False, "norm_topk_prob": False},
}


def hf_family(config: ModelConfig) -> str | None:
    """The Hugging Face model type that computes the same function: deepseek_v3, deepseek_v2 or None."""
    router = config.router
    shared = (
        config.attention == "mla"
        and config.num_experts > 0
        and config.num_shared_experts > 0
        and router.selection == "top_k"
        and router.num_hash_layers == 0
        and router.noise != "learned"
        and router.capacity.eval_factor == 0
        and config.moe_every == 1
    )
    group_dim = config.num_experts // config.num_groups
    if shared and router.score == "sigmoid" and router.group_score == "top2" and group_dim >= 2:
        return None if router.bias == "multiplicative" else "deepseek_v3"
    grouped_alike = router.group_score == "max" or config.num_groups == 1
    if shared and router.score == "softmax" and grouped_alike and router.bias == "none" and not router.normalize:
        return None if config.mtp_depth else "deepseek_v2"
    return None


def config_to_hf(config: ModelConfig, *, bos_id: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a model directory; `dtype` is the stored precision, such as "float32"."""
    family = hf_family(config)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "torch_dtype": dtype}
    if family is None:
        own = {"model_type": "moestro", "architectures": ["MoestroForCausalLM"]}
        return own | {"moestro": config.model_dump(mode="json")} | ids
    tree: dict[str, Any] = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    tree |= {theirs: getattr(config, ours) for ours, theirs in PLAIN_KEYS.items()}
    tree |= WRITTEN_KEYS[family]
    tree |= {
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank or None,
        "norm_topk_prob": config.router.normalize,
        "routed_scaling_factor": config.router.scale,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config),
    }
    if family == "deepseek_v2":
        tree["topk_method"] = "greedy" if config.num_groups == 1 else "group_limited_greedy"
    return tree | ids


def _rope_to_hf(config: ModelConfig) -> dict[str, Any] | None:
    rope = config.rope
    if rope.factor == 1:
        return None
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_seq_len,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a checkpoint tensor goes: rows `start:stop` of a parameter, or of one expert if `expert` is given."""

    parameter: str
    expert: int | None = None
    start: int | None = None
    stop: int | None = None


def tensor_map(config: ModelConfig) -> dict[str, Slot]:
    """Hugging Face tensor name -> slot, for every tensor of a checkpoint written here (experts one by one)."""
    entries = {"model.embed_tokens.weight": Slot("embed.weight"), "model.norm.weight": Slot("norm.weight")}
    if not config.tie_embeddings:
        entries["lm_head.weight"] = Slot("head.weight")
    for layer in range(config.num_layers):
        entries |= _block_map(config, f"model.layers.{layer}", f"layers.{layer}", dense=not config.is_moe(layer))
    for depth in range(config.mtp_depth):
        theirs, ours = f"model.layers.{config.num_layers + depth}", f"mtp.{depth}"
        entries |= _block_map(config, theirs, f"{ours}.block", dense=config.num_experts == 0)
        names = {
            "enorm": "embed_norm",
            "hnorm": "hidden_norm",
            "eh_proj": "project",
            "shared_head.norm": "norm",
        }
        entries |= {f"{theirs}.{name}.weight": Slot(f"{ours}.{own}.weight") for name, own in names.items()}
    return entries


def _block_map(config: ModelConfig, theirs: str, ours: str, *, dense: bool) -> dict[str, Slot]:
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.out",
    }
    if config.attention == "mla":
        names |= {
            "self_attn.kv_a_proj_with_mqa": "attention.kv_down",
            "self_attn.kv_a_layernorm": "attention.kv_norm",
            "self_attn.kv_b_proj": "attention.kv_up",
        }
    else:
        names["self_attn.kv_proj"] = "attention.kv"
    if config.attention == "mla" and config.q_lora_rank:
        names |= {
            "self_attn.q_a_proj": "attention.q_down",
            "self_attn.q_a_layernorm": "attention.q_norm",
            "self_attn.q_b_proj": "attention.q_up",
        }
    else:
        names["self_attn.q_proj"] = "attention.q"
    entries = {f"{theirs}.{name}.weight": Slot(f"{ours}.{own}.weight") for name, own in names.items()}
    if dense:
        return entries | _mlp_map(f"{theirs}.mlp", f"{ours}.ffn", config.dense_dim)
    if SCORES[config.router.score].is_learned:
        entries[f"{theirs}.mlp.gate.weight"] = Slot(f"{ours}.ffn.router.weight")
    if config.router.noise == "learned":
        entries[f"{theirs}.mlp.gate.noise.weight"] = Slot(f"{ours}.ffn.router.noise")
    if hf_family(config) != "deepseek_v2":
        entries[f"{theirs}.mlp.gate.e_score_correction_bias"] = Slot(f"{ours}.ffn.router.bias")
    if config.num_shared_experts:
        width = config.expert_dim * config.num_shared_experts
        entries |= _mlp_map(f"{theirs}.mlp.shared_experts", f"{ours}.ffn.shared", width)
    for expert in range(config.num_experts):
        prefix, stack = f"{theirs}.mlp.experts.{expert}", f"{ours}.ffn.experts"
        entries |= _gate_up_map(prefix, f"{stack}.gate_up", config.expert_dim, expert)
        entries[f"{prefix}.down_proj.weight"] = Slot(f"{stack}.down", expert)
    return entries


def _gate_up_map(theirs: str, parameter: str, width: int, expert: int | None) -> dict[str, Slot]:
    return {
        f"{theirs}.gate_proj.weight": Slot(parameter, expert, 0, width),
        f"{theirs}.up_proj.weight": Slot(parameter, expert, width, 2 * width),
    }


def _mlp_map(theirs: str, ours: str, width: int) -> dict[str, Slot]:
    entries = _gate_up_map(theirs, f"{ours}.gate_up.weight", width, None)
    return entries | {f"{theirs}.down_proj.weight": Slot(f"{ours}.down.weight")}


def fused_slots(config: ModelConfig) -> dict[str, Slot]:
    """Names that newer transformers versions write, with all experts of a layer in one tensor."""
    entries = {}
    for name, slot in tensor_map(config).items():
        if slot.expert == 0 and not slot.start:
            layer = name.split(".mlp.experts.")[0]
            kind = "gate_up_proj" if slot.stop else "down_proj"
            entries[f"{layer}.mlp.experts.{kind}"] = Slot(slot.parameter)
    return entries


def duplicate_names(config: ModelConfig) -> Iterator[str]:
    """Tensors that published checkpoints repeat: MTP's copies of embedding and head, tied heads, RoPE tables."""
    yield "lm_head.weight"
    for layer in range(config.num_layers + config.mtp_depth):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
    for layer in range(config.num_layers, config.num_layers + config.mtp_depth):
        yield f"model.layers.{layer}.embed_tokens.weight"
        yield f"model.layers.{layer}.shared_head.head.weight"
