"""config.json there and back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from moestro.checkpoints.hf import config_to_hf, hf_family
from moestro.checkpoints.hf_config import hf_to_config
from moestro.config import ModelConfig, build_config, load_preset, preset_names
from moestro.errors import CheckpointError

YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


def tree_of(name: str = "demo", *overrides: str) -> dict[str, Any]:
    return config_to_hf(build_config(load_preset(name), overrides).model, bos_id=0, eos_id=1, dtype="float32")


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive(name: str) -> None:
    config = build_config(load_preset(name)).model
    tree = config_to_hf(config, bos_id=0, eos_id=1, dtype="bfloat16")
    assert tree["model_type"] == (hf_family(config) or "moestro")
    training_only = {"bias_speed": config.router.bias_speed, "balance": config.router.balance}
    again = hf_to_config(tree)
    assert again.model_copy(update={"router": again.router.model_copy(update=training_only)}) == config


def test_presets_belong_to_the_family_that_can_run_them() -> None:
    families = {name: hf_family(build_config(load_preset(name)).model) for name in preset_names()}
    for name in ("deepseek-v3", "moonlight-16b-a3b", "demo", "small"):
        assert families[name] == "deepseek_v3"
    for name in ("deepseek-v2", "deepseek-v2-lite"):
        assert families[name] == "deepseek_v2"


@pytest.mark.parametrize(
    "override",
    ["model.mtp_depth=1", "model.router.normalize=true", "model.router.bias=sign", "model.attention=mha",
     "model.router.capacity.eval_factor=2", "model.num_shared_experts=0"],
)  # fmt: skip
def test_what_no_transformers_model_computes_is_written_as_our_own(override: str) -> None:
    assert tree_of("deepseek-v2-lite", override)["model_type"] == "moestro"


def test_kimi_k2_is_deepseek_v3_by_another_name() -> None:
    tree = tree_of("moonlight-16b-a3b")
    assert hf_to_config(tree | {"model_type": "kimi_k2"}) == hf_to_config(tree)


def test_v2_selects_greedily_or_in_groups() -> None:
    tree = tree_of("deepseek-v2")
    assert tree["topk_method"] == "group_limited_greedy"
    assert hf_to_config(tree).num_groups == 8
    assert hf_to_config(tree | {"topk_method": "greedy"}).num_groups == 1
    assert tree_of("deepseek-v2-lite")["topk_method"] == "greedy"
    with pytest.raises(CheckpointError, match="topk_method='noaux_tc'"):
        hf_to_config(tree | {"topk_method": "noaux_tc"})
    with pytest.raises(CheckpointError, match="norm_topk_prob"):
        hf_to_config(tree | {"norm_topk_prob": True})


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(CheckpointError, match="sliding_window"):
        hf_to_config(tree_of() | {"sliding_window": 7})


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "gelu"), ("attention_bias", True), ("moe_layer_freq", 2)])
def test_a_value_that_is_not_supported_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        hf_to_config(tree_of() | {key: value})


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v4", None])
def test_other_models_are_refused_by_name(model_type: str | None) -> None:
    with pytest.raises(CheckpointError, match=model_type or "no model_type"):
        hf_to_config(tree_of() | {"model_type": model_type})


def test_missing_sizes_are_named() -> None:
    tree = tree_of()
    del tree["hidden_size"]
    with pytest.raises(CheckpointError, match="hidden_size"):
        hf_to_config(tree)


def test_both_spellings_of_rope() -> None:
    tree = tree_of()
    for key in ("rope_theta", "rope_scaling"):
        tree.pop(key, None)
    old = hf_to_config(tree | {"rope_theta": 50000.0, "rope_scaling": {"type": "yarn", **YARN}})
    new = hf_to_config(tree | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000.0, **YARN}})
    assert old == new
    assert (old.rope.theta, old.rope.factor, old.rope.mscale_all_dim) == (50000.0, 40.0, 1.0)
    plain = hf_to_config(tree | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert (plain.rope.theta, plain.rope.factor) == (7.0, 1.0)
    with pytest.raises(CheckpointError, match="longrope"):
        hf_to_config(tree | {"rope_scaling": {"type": "longrope"}})


def test_the_published_file_of_v3_is_the_preset() -> None:
    """The keys of DeepSeek-V3's own config.json, without quantization_config."""
    published = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
        "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 10000, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
        "v_head_dim": 128, "vocab_size": 129280,
    }  # fmt: skip
    expected = build_config(load_preset("deepseek-v3"), ["model.init_std=0.02"]).model
    assert hf_to_config(published) == expected


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": "yarn"}, {"quantization_config": "fp8"}, {"num_hidden_layers": None},
     {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 2.0}}],
)  # fmt: skip
def test_malformed_and_unsupported_values_are_named(change: dict[str, Any]) -> None:
    tree = config_to_hf(ModelConfig(), bos_id=0, eos_id=1, dtype="float32")
    with pytest.raises(CheckpointError, match=next(iter(change))[:4]):
        hf_to_config(tree | change)
