"""Facts about config.json of Hugging Face: the model types that are DeepSeek's by layout, their keys, and all defaults.

A `Family` says what transformers assumes for a key that is missing. Keys fall into three kinds:

    keys of `defaults`   sizes and switches of the model: read, and checked for type and range
    keys of `fixed`      change the function: only the values listed here are supported
    `INERT`              change nothing that is computed: bookkeeping of transformers and of published releases

Any other key might change the function, so it is refused unless it can only be a tool's own note (`is_note`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

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
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers")
# the smallest and the largest value of a key; no model comes near the largest, and products of them stay below 2⁶³
LONGEST = 2**31 - 1
RANGES: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24), "hidden_size": (1, 2**20), "num_hidden_layers": (1, 2000),
    "first_k_dense_replace": (0, 2000), "intermediate_size": (1, 2**22), "max_position_embeddings": (1, LONGEST),
    "num_attention_heads": (1, 2**16), "q_lora_rank": (1, 2**20), "kv_lora_rank": (1, 2**20),
    "qk_nope_head_dim": (0, 2**16), "qk_rope_head_dim": (2, 2**16), "v_head_dim": (1, 2**16),
    "n_routed_experts": (0, 2**16), "n_shared_experts": (0, 2**10), "num_experts_per_tok": (1, 2**16),
    "n_group": (1, 2**16), "topk_group": (1, 2**16), "moe_intermediate_size": (1, 2**22),
    "num_nextn_predict_layers": (0, 100),
}  # fmt: skip
MOE_KEYS = (
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size",
    "first_k_dense_replace", "num_nextn_predict_layers", "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip

# other names of the same keys
ALIASES = {
    "num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}  # fmt: skip
COMMON_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None), "is_encoder_decoder": (False, None), "add_cross_attention": (False, None),
    "pruned_heads": ({}, None), "use_sliding_window": (False, None), "sliding_window": (None,),
    "tie_encoder_decoder": (False, None), "quantization": (None,), "rope_interleave": (True,),
}  # fmt: skip
SIGMOID: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)}


@dataclass(frozen=True)
class Family:
    """What transformers reads from a config.json of one model type, and assumes where a key is missing.

    A default of None means that transformers cannot run without the key. `score` is how routers score experts.
    """

    defaults: dict[str, Any]
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=lambda: COMMON_FIXED | SIGMOID)
    score: str = "sigmoid"


V3 = Family(
    {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "norm_topk_prob": True, "max_position_embeddings": 4096,
        "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "num_nextn_predict_layers": 0,  # the files tell; transformers never runs these modules in a forward pass
    }
)  # fmt: skip
V2 = Family(
    V3.defaults | {
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
        "num_hidden_layers": 32, "num_attention_heads": 32, "n_shared_experts": 2, "n_routed_experts": 64,
        "routed_scaling_factor": 1.0, "n_group": None, "topk_group": None, "num_experts_per_tok": None,
        "first_k_dense_replace": 0, "norm_topk_prob": False, "max_position_embeddings": 2048, "topk_method": "greedy",
    },
    COMMON_FIXED | {"scoring_func": ("softmax", None), "norm_topk_prob": (False, None)},
    score="softmax",
)  # fmt: skip
GLM4_LITE = Family(
    V3.defaults | {
        "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
        "num_hidden_layers": 47, "num_attention_heads": 20, "n_routed_experts": 64, "routed_scaling_factor": 1.8,
        "q_lora_rank": 768, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 4, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1,
    }
)  # fmt: skip
YOUTU = Family(
    {key: value for key, value in V3.defaults.items() if key not in MOE_KEYS} | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
        "num_attention_heads": 16, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "embedding_initializer_range": 0.02,
    },
    COMMON_FIXED,
)  # fmt: skip

FAMILIES = {
    "deepseek_v3": V3, "deepseek_v2": V2,
    "kimi_k2": V3,  # config.json of Kimi-K2 says so that its class is DeepseekV3ForCausalLM
    "glm4_moe_lite": GLM4_LITE, "youtu": YOUTU, "youtu_llm": YOUTU,
}  # fmt: skip
ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}  # that we write
# models of text and images whose text part is of a family above, under `text_config`
WITH_TEXT_PART = ("kimi_vl", "kimi_k25")
# where the tensors of a text part are, and what is left of their names: in releases, in transformers 5, and in what
# transformers 5.23 saves of a Kimi-K2.5, whose layers it calls blocks on the way out
TEXT_PREFIXES = {"language_model.model.blocks.": "model.layers.", "language_model.model.": "model.",
                 "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}  # fmt: skip
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "mm_projector.",
               "model.vision_tower.", "model.multi_modal_projector.", "model.mm_projector.")  # fmt: skip

GQA = "its attention is grouped-query, not MLA"
# what sets other model types apart
DIFFERENT = {
    "deepseek_v32": "its attention reads only tokens that an indexer picks",
    "glm_moe_dsa": "its attention reads only tokens that an indexer picks",
    "deepseek_v4": "its attention is compressed and sparse, its residual stream is several wide, and its first layers "
    "route by a hash",
    "deepseek": "its attention is multi-head, not MLA",
    "deepseek_vl_v2": "its text part is not stored as DeepSeek-V2 stores it",
    "longcat_flash": "its layers have two attentions each, and some experts compute nothing",
    "kimi_linear": "most of its attention is linear (KDA)",
    "minicpm3": "its residuals, embeddings and logits are scaled",
    "youtu_vl": "it predicts image tokens, too",
    "gpt_oss": f"{GQA}, has sinks and windows, and its experts have biases",
    "llama4": f"{GQA}, in chunks, and its routers choose one expert by a sigmoid",
    "llama": f"{GQA}, and it has no experts (so have the R1-Distill models)",
    "qwen2": f"{GQA}, and it has no experts (so have the R1-Distill models)",
    "qwen3_next": "most of its attention is linear (Gated DeltaNet)",
} | dict.fromkeys(
    ("glm4_moe", "glm4v_moe", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "olmoe", "dots1", "phimoe",
     "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe", "bailing_moe", "granitemoe", "qwen3", "mistral", "gemma3"),
    GQA,
)  # fmt: skip

# attributes that transformers and published releases write into config.json, none of which a forward pass reads
INERT = frozenset({
    "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "_name_or_path", "name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "prefix", "num_key_value_heads", "head_dim", "qk_head_dim",
    "attention_dropout", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "router_aux_loss_coef",
    "output_router_logits", "router_jitter_noise", "initializer_range", "embedding_initializer_range",
    "return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "is_decoder", "chunk_size_feed_forward", "cross_attention_hidden_size", "finetuning_task",
    "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "tie_last_hidden_states",
})  # fmt: skip
NOTES = frozenset({"unsloth_fixed", "attn_implementation", "experts_implementation", "gradient_checkpointing"})
RELEASE = re.compile(r"v?\d+(\.\d+)+\S*")


def is_note(key: str, value: Any) -> bool:
    """Whether a key that no model reads is a tool's own: private to it, its release, on the list, or without a value.

    >>> is_note("unsloth_version", "2025.3.1"), is_note("sliding_window_size", 7)
    (True, False)
    """
    is_release = key.endswith("_version") and isinstance(value, str) and RELEASE.fullmatch(value) is not None
    return key.startswith("_") or is_release or key in NOTES or value is None
