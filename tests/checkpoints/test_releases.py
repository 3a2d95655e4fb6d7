"""Published config.json files of releases: their keys are taken, and give the published numbers of parameters.

The values are facts about each release, as other public projects quote them in their own tests; files are not copied.
"""

from __future__ import annotations

from typing import Any

import pytest

from moestro.checkpoints.hf_config import read_hf_config, text_part
from moestro.checkpoints.quantized import read_scheme
from moestro.model.size import measure_size

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
NOTES = {  # bookkeeping that all releases by DeepSeek and Moonshot have
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1,
    "pretraining_tp": 1, "moe_layer_freq": 1, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
}  # fmt: skip
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
V2: dict[str, Any] = MLA | NOTES | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 2, "n_routed_experts": 160, "num_experts_per_tok": 6,
    "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
    "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "q_lora_rank": 1536,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": YARN | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
    "bos_token_id": 100000, "eos_token_id": 100001, "transformers_version": "4.39.3",
}  # fmt: skip
V2_LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "routed_scaling_factor": 1.0, "q_lora_rank": None,
}  # fmt: skip
V3: dict[str, Any] = MLA | NOTES | SIGMOID | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "q_lora_rank": 1536,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, "bos_token_id": 0, "eos_token_id": 1,
    "transformers_version": "4.33.1",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}  # fmt: skip
V31 = V3 | {"quantization_config": V3["quantization_config"] | {"scale_fmt": "ue8m0"}}
MOONLIGHT = V3 | {
    "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446, "q_lora_rank": None, "num_nextn_predict_layers": 0, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "bos_token_id": 163584, "eos_token_id": 163586,
    "transformers_version": "4.46.3", "rope_scaling": None, "quantization_config": None,
}  # fmt: skip
KIMI_VL = {
    "model_type": "kimi_vl", "architectures": ["KimiVLForConditionalGeneration"], "media_placeholder_token_id": 163605,
    "vision_config": {"model_type": "moonvit"},
    "text_config": MOONLIGHT | {"rope_theta": 800000.0, "max_position_embeddings": 131072},
}  # fmt: skip
KIMI_K2 = V3 | {
    "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
    "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 131072, "rope_theta": 50000.0,
    "rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
                                              "symmetric": True}}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
}  # fmt: skip
KIMI_K25 = {
    "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "tie_word_embeddings": False,
    "media_placeholder_token_id": 163605, "use_unified_vision_chunk": True, "vision_config": {"patch_size": 14},
    "text_config": KIMI_K2 | {
        "quantization_config": INT4, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
        "rope_scaling": YARN | {"factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}  # fmt: skip
GLM: dict[str, Any] = {
    "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "vocab_size": 154880,
    "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536, "num_hidden_layers": 47,
    "num_attention_heads": 20, "num_key_value_heads": 20, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0, "attention_bias": False, "max_position_embeddings": 202752, "rope_theta": 1e6,
    "rope_scaling": None, "partial_rotary_factor": 1.0, "q_lora_rank": 768, "kv_lora_rank": 512,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 64, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "first_k_dense_replace": 1, "tie_word_embeddings": False, "dtype": "bfloat16",
    "num_nextn_predict_layers": 1, "pad_token_id": 154820, "eos_token_id": [154820, 154827, 154829],
}  # fmt: skip
YOUTU: dict[str, Any] = MLA | {
    "model_type": "youtu", "architectures": ["YoutuForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": 1536, "qk_head_dim": 192, "rope_interleave": True, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1600000, "rope_type": "default"},
}  # fmt: skip

# release -> its keys; billions of parameters as published, all and active for a token (with or without the embedding;
# GLM-4.7-Flash is said to have 3, and has 3.6 without)
RELEASES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "DeepSeek-V2": (V2, 236, 21),
    "DeepSeek-V2-Lite": (V2_LITE, 15.7, 2.4),
    "DeepSeek-V3": (V3, 671, 37),
    "DeepSeek-V3.1": (V31, 671, 37),
    "Moonlight-16B-A3B": (MOONLIGHT, 16, 3),
    "Kimi-VL-A3B": (KIMI_VL, 16, 2.8),
    "Kimi-K2": (KIMI_K2, 1040, 32),
    "Kimi-K2.5": (KIMI_K25, 1040, 32),
    "GLM-4.7-Flash": (GLM, 30, None),
    "Youtu-LLM-2B": (YOUTU, 1.96, 1.96),
}
FORMATS = {
    "DeepSeek-V3": "fp8, blocks 128 x 128, fp32 scales",
    "DeepSeek-V3.1": "fp8, blocks 128 x 128, ue8m0 scales",
    "Kimi-K2": "fp8, blocks 128 x 128, fp32 scales",
    "Kimi-K2.5": "int4, blocks 1 x 32, fp32 scales",
}


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_taken_and_has_its_published_size(release: str) -> None:
    tree, total, active = RELEASES[release]
    read = read_hf_config(tree)
    assert read.notices == () or "reads text alone" in read.notices[0]
    size = measure_size(read.model)
    assert size.total / 1e9 == pytest.approx(total, rel=0.02)
    counted = (size.active / 1e9, size.active_without_embedding / 1e9)
    assert active is None or any(count == pytest.approx(active, rel=0.05) for count in counted)
    assert str(read_scheme(text_part(tree))) == FORMATS.get(release, "None")
