"""The only place that knows Hugging Face names: config.json and tensor names of `deepseek_v3` and `deepseek_v2`.

A model that Hugging Face's `DeepseekV3ForCausalLM` or `DeepseekV2ForCausalLM` can run is written as such. Any other
(dense, MHA, capacity …) is written as `model_type: moestro`, with Moestro's own config under the key `moestro` and the
same tensor names where they exist. MTP modules follow as layers `num_hidden_layers + k`, as DeepSeek ships them.

Accounting is strict: an unused tensor or config key is an error, and so is a parameter that nothing fills.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moestro.checkpoints.quantized import read_scheme
from moestro.config import ModelConfig, build_config
from moestro.errors import CheckpointError
from moestro.scores import SCORES

# our key -> their key; values are copied unchanged
PLAIN_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "dense_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "num_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "num_groups": "n_group",
    "top_k_groups": "topk_group",
    "expert_dim": "moe_intermediate_size",
    "mtp_depth": "num_nextn_predict_layers",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
LARGEST_SIZE = 2**31 - 1
# keys that must have this value if given: models with any other value are not supported
COMMON_KEYS: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1, "pretraining_tp": 1,
    "output_router_logits": False,
}  # fmt: skip
FIXED_KEYS: dict[str, dict[str, Any]] = {
    "deepseek_v3": COMMON_KEYS | {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": COMMON_KEYS | {"scoring_func": "softmax", "mlp_bias": False, "norm_topk_prob": False},
}
ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
SAME_AS = {"kimi_k2": "deepseek_v3"}  # Kimi-K2 is DeepSeek-V3 by another name
# keys that do not change what the model computes
IGNORED_KEYS = {
    "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads", "attention_dropout", "aux_loss_alpha",
    "seq_aux", "ep_size", "q_lora_rank", "norm_topk_prob", "routed_scaling_factor", "rope_theta", "rope_scaling",
    "rope_parameters", "quantization_config", "topk_method", "head_dim", "qk_head_dim", "num_local_experts",
    "num_mtp_layers", "_name_or_path", "router_aux_loss_coef", "chunk_size_feed_forward", "return_dict",
    "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "is_encoder_decoder",
}  # fmt: skip


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
    tree |= FIXED_KEYS[family]
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


def hf_to_config(tree: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from a config.json; raises CheckpointError naming a key that cannot be honoured."""
    read_scheme(tree)  # refuses what `ModelFiles` could not read
    model_type = str(tree.get("model_type"))
    if model_type == "moestro" and isinstance(tree.get("moestro"), dict):
        return build_config({"model": tree["moestro"]}).model
    family = SAME_AS.get(model_type, model_type)
    if family not in FIXED_KEYS:
        supported = ", ".join([*FIXED_KEYS, *SAME_AS])
        raise CheckpointError(f"config.json has model_type '{model_type}'; supported are {supported}")
    _refuse_what_is_unsupported(tree, FIXED_KEYS[family])
    defaults = HF_DEFAULTS[family] | {theirs: value for theirs, value in tree.items() if value is not None}
    model: dict[str, Any] = {ours: defaults[theirs] for ours, theirs in PLAIN_KEYS.items()}
    model["q_lora_rank"] = tree.get("q_lora_rank", 1536) or 0
    model["router"] = {"normalize": defaults["norm_topk_prob"], "scale": defaults["routed_scaling_factor"]}
    model["rope"] = _rope_from_hf(tree, model["max_seq_len"])
    if family == "deepseek_v2":
        model["router"] |= {"score": "softmax", "group_score": "max", "bias": "none"}
        match defaults["topk_method"]:
            case "greedy":
                model |= {"num_groups": 1, "top_k_groups": 1}
            case "group_limited_greedy":
                pass
            case other:
                raise CheckpointError(
                    f"config.json has topk_method={other!r}; supported are greedy and group_limited_greedy"
                )
    return build_config({"model": model}).model


def _refuse_what_is_unsupported(tree: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(tree.get(key) or {}, Mapping):
            raise CheckpointError(f"config.json has {key}={tree[key]!r}, which is no object")
    for key, value in fixed.items():
        if tree.get(key, value) not in (value, None):
            raise CheckpointError(f"config.json has {key}={tree[key]!r}; supported is {value!r}")
    for key in (*PLAIN_KEYS.values(), "q_lora_rank"):
        if isinstance(tree.get(key), int) and tree[key] > LARGEST_SIZE:
            raise CheckpointError(f"config.json has {key}={tree[key]}, which no model has")
    unknown = sorted(set(tree) - set(PLAIN_KEYS.values()) - set(fixed) - IGNORED_KEYS)
    if unknown:
        raise CheckpointError(f"config.json has keys that nothing here uses: {', '.join(unknown)}")
    required = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if tree.get(key) is None]
    if required:
        raise CheckpointError(f"config.json lacks {', '.join(required)}")


# what transformers assumes for keys missing from config.json
COMMON_DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
}  # fmt: skip
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": COMMON_DEFAULTS | {
        "first_k_dense_replace": 3, "intermediate_size": 18432, "max_position_embeddings": 4096,
        "num_attention_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "moe_intermediate_size": 2048, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "deepseek_v2": COMMON_DEFAULTS | {
        "first_k_dense_replace": 0, "intermediate_size": 11008, "max_position_embeddings": 2048,
        "num_attention_heads": 32, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 1,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1407, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "topk_method": "greedy",
    },
}  # fmt: skip


def _rope_from_hf(tree: Mapping[str, Any], max_seq_len: Any) -> dict[str, Any]:
    """RoPE settings in either form: `rope_theta` + `rope_scaling`, or `rope_parameters` of transformers 5."""
    scaling = dict(tree.get("rope_parameters") or {}) | dict(tree.get("rope_scaling") or {})
    rope: dict[str, Any] = {"theta": scaling.get("rope_theta") or tree.get("rope_theta") or 10000.0}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return rope
    if kind != "yarn":
        raise CheckpointError(f"config.json has rope type '{kind}'; supported are default and yarn")
    for key, value in {"attention_factor": None, "truncate": True}.items():
        if scaling.get(key, value) not in (value, None):
            raise CheckpointError(f"config.json has rope {key}={scaling[key]!r}, which is not supported")
    original = scaling.get("original_max_position_embeddings") or 4096
    for length in (original, max_seq_len):
        if not isinstance(length, int | float) or not length >= 1:
            raise CheckpointError(f"config.json has a rotary embedding over {length!r} positions")
    rope |= {
        "factor": scaling.get("factor") or max_seq_len / original,
        "original_max_seq_len": original,
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
        "mscale": scaling.get("mscale") or 0.0,
        "mscale_all_dim": scaling.get("mscale_all_dim") or 0.0,
    }
    return rope


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
