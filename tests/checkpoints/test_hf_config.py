"""config.json against transformers, key by key: what is missing, null, of another type, or unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from moestro.checkpoints.families import DIFFERENT, FAMILIES, PLAIN_KEYS, RANGES
from moestro.checkpoints.files import ModelFiles
from moestro.checkpoints.hf_config import hf_to_config, read_hf_config
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import build_config
from moestro.errors import CheckpointError

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4}
TYPES = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite", "youtu")
# transformers cannot run a V2 without a number of experts for each token
COMPLETE = {name: SIZES | ({"num_experts_per_tok": 2} if name == "deepseek_v2" else {}) for name in TYPES}
OURS = {theirs: ours for ours, theirs in PLAIN_KEYS.items()}
# what no forward pass of transformers reads: MTP modules are counted in the files, and weights are there already
NOT_COMPARED = {"num_nextn_predict_layers", "initializer_range", "embedding_initializer_range"}


def tree_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type} | COMPLETE[model_type] | changes


def read_key(tree: dict[str, Any], key: str) -> Any:
    """What our configuration has for a key of theirs."""
    config = hf_to_config(tree)
    match key:
        case "q_lora_rank":
            return config.q_lora_rank or None
        case "norm_topk_prob":
            return config.router.normalize
        case "routed_scaling_factor":
            return config.router.scale
        case "rope_theta":
            return config.rope.theta
        case "topk_method":
            return "greedy" if config.num_groups == 1 else "group_limited_greedy"
        case "first_k_dense_replace":
            return [config.is_moe(layer) for layer in range(config.num_layers)]
        case _:
            return getattr(config, OURS[key])


def their_key(tree: dict[str, Any], key: str) -> Any:
    """What transformers has for it after reading the same tree."""
    settings = {name: value for name, value in tree.items() if name != "model_type"}
    config = AutoConfig.for_model(tree["model_type"], **settings)
    if key == "rope_theta":
        return config.rope_parameters["rope_theta"]
    if key == "first_k_dense_replace" and tree["model_type"] == "glm4_moe_lite":
        return [kind == "sparse" for kind in config.mlp_layer_types]
    value = getattr(config, key)
    if key == "first_k_dense_replace":
        return [layer >= value for layer in range(config.num_hidden_layers)]
    if key in ("n_group", "topk_group") and value is None:
        return 1  # greedy: one group of all experts
    return value


CASES = [
    (name, key)
    for name in TYPES
    for key in FAMILIES[name].defaults
    if key not in NOT_COMPARED and key not in SIZES and (name, key) != ("deepseek_v2", "num_experts_per_tok")
]


@pytest.mark.parametrize(("model_type", "key"), CASES)
def test_a_missing_key_means_what_it_means_to_transformers(model_type: str, key: str) -> None:
    tree = tree_of(model_type)
    assert read_key(tree, key) == their_key(tree, key)


@pytest.mark.parametrize(("model_type", "key"), CASES)
def test_null_means_what_it_means_to_transformers_or_is_refused(model_type: str, key: str) -> None:
    tree = tree_of(model_type, **{key: None})
    try:
        ours = read_key(tree, key)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert key in refusal
        return
    try:
        theirs = their_key(tree, key)
    except StrictDataclassError:
        pytest.fail(f"transformers refuses null here, and {ours} was read")
    assert (ours or None) == (theirs or None)


def test_every_size_of_ours_is_compared() -> None:
    compared = {key for name, key in CASES if name == "deepseek_v3"}
    assert compared | NOT_COMPARED | SIZES.keys() >= set(PLAIN_KEYS.values()) | {"q_lora_rank", "norm_topk_prob"}


def test_a_v2_needs_a_number_of_experts_for_each_token() -> None:
    with pytest.raises(CheckpointError, match="lacks num_experts_per_tok"):
        hf_to_config({"model_type": "deepseek_v2"} | SIZES)


@pytest.mark.parametrize("value", ["64", [64], {}, True, 1e3, float("inf"), float("nan"), -1, 2**40, 10**400, 1.5])
@pytest.mark.parametrize("key", sorted(RANGES))
def test_numbers_of_another_kind_are_refused_in_one_line(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key}=.*whole number") as caught:
        hf_to_config(tree_of("deepseek_v3", **{key: value}))
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["2.5", [1.0], True, float("inf"), float("nan"), -1.0, 1e300])
@pytest.mark.parametrize("key", ["rms_norm_eps", "routed_scaling_factor", "rope_theta"])
def test_factors_of_another_kind_are_refused_in_one_line(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key}=.*number"):
        hf_to_config(tree_of("deepseek_v3", **{key: value}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1; it must be true or false"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob='yes'; it must be true or false"),
        ({"attention_bias": 0}, "attention_bias=0; supported is false"),
        ({"rope_interleave": None}, "rope_interleave=null; supported is true"),
        ({"rope_interleave": False}, "rope_interleave=false; supported is true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; supported is 1.0"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2; supported is a list of 0 for the first layers, then 1, 4 in all"),
        ({"moe_layer_freq": [0, 1, 0, 1]}, r"moe_layer_freq=\[0, 1, 0, 1\]"),
        ({"moe_layer_freq": [0, 0, 1, 1], "first_k_dense_replace": 1}, "1 dense layers .* but 2 dense layers"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types='dense'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"num_local_experts": 8, "n_routed_experts": 16}, "n_routed_experts=16, but num_local_experts=8"),
        ({"model_type": ["deepseek_v3"]}, "model_type"),
        ({"rope_scaling": {"type": "yarn", "factor": "40"}}, "factor='40'; it must be a number"),
        ({"rope_scaling": {"type": "yarn"}}, "YaRN without a factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor of 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mscale": "1"}}, "mscale='1'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": None}}, "original_max"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope type \['yarn'\]"),
        ({"rope_scaling": {"type": "default", "stretch": 2}}, "settings in rope_scaling .* stretch"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 7.0}}, "differ: remove one"),
        ({"rope_theta": None}, "rope_theta=null"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ({"quantization_config": {"quant_method": ["fp8"]}}, "quant_method"),
        ({"\x1b[31mred": 1}, r"\\x1b\[31mred"),
    ],
)
def test_what_cannot_be_honoured_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        hf_to_config(tree_of("deepseek_v3") | change)


def test_whole_numbers_may_stand_for_factors() -> None:
    yarn = {"type": "yarn", "factor": 40, "mscale": 1, "mscale_all_dim": 1, "original_max_position_embeddings": 4096}
    config = hf_to_config(tree_of("deepseek_v3", rope_theta=10000, routed_scaling_factor=2, rope_scaling=yarn))
    assert (config.rope.factor, config.rope.mscale, config.router.scale) == (40.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("key", "value"), [("moe_layer_freq", [0, 0, 1, 1]), ("mlp_layer_types", ["dense"] * 2 + ["sparse"] * 2)]
)
def test_lists_may_say_which_layers_have_experts(key: str, value: list[Any]) -> None:
    assert hf_to_config(tree_of("deepseek_v3", **{key: value})).moe_layers == [2, 3]


def test_first_layers_beyond_the_last_are_all_layers() -> None:
    """V3's default of three dense layers, in a model of two."""
    assert hf_to_config(tree_of("deepseek_v3", num_hidden_layers=2)).moe_layers == []


def test_keys_of_other_tools_are_noticed_and_those_of_transformers_are_not() -> None:
    tools = {"_attn_implementation_autoset": True, "unsloth_version": "2025.3.1", "sliding_window_size": None}
    theirs = {"torchscript": False, "temperature": 1.0, "id2label": {"0": "a"}, "use_cache": True, "ep_size": 1}
    read = read_hf_config(tree_of("deepseek_v3") | tools | theirs)
    assert read.model == hf_to_config(tree_of("deepseek_v3"))
    assert len(read.notices) == 1
    assert all(key in read.notices[0] for key in tools) and not any(key in read.notices[0] for key in theirs)


@pytest.mark.parametrize("key", ["sliding_window_size", "attention_version", "use_qk_norm", "transformers_weights"])
def test_a_key_that_might_change_the_function_is_refused_unless_it_is_ignored(key: str) -> None:
    tree = tree_of("deepseek_v3", **{key: "v2"})
    with pytest.raises(CheckpointError, match=key) as caught:
        hf_to_config(tree)
    assert "--ignore-config-keys" in str(caught.value.hint) and "--" not in str(caught.value)
    read = read_hf_config(tree, {key})
    assert read.model == hf_to_config(tree_of("deepseek_v3")) and key not in read.tree
    assert read.notices == (f"config.json: ignored as asked: {key}",)


@pytest.mark.parametrize("model_type", sorted(DIFFERENT))
def test_other_models_are_refused_with_what_differs(model_type: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf_to_config(SIZES | {"model_type": model_type})
    assert DIFFERENT[model_type] in str(caught.value) and f"'{model_type}'" in str(caught.value)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    settings = ["model.num_layers=2", "model.num_experts=4", "model.hidden_dim=32", "model.vocab_size=300"]
    config = build_config({"model": {"top_k": 2, "mtp_depth": 1}}, settings).model
    write_random_model(config, tmp_path / "model", seed=0, dtype="bf16")
    return tmp_path / "model"


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"num_hidden_layers": 2000},
            "2000 layers, but the files hold 3 of them: layer 3 is the first that is missing",
        ),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers=100000; it must be a whole number from 1 to 2000"),
        ({"n_routed_experts": 60_000}, "60000 routed experts a layer, but the files hold 4"),
        ({"n_routed_experts": 10_000_000}, "n_routed_experts=10000000; it must be a whole number from 0 to 65536"),
        ({"num_hidden_layers": 1}, "describes 1 layers, but the files hold 3"),
        ({"hidden_size": 2**20, "vocab_size": 2**24}, "the embedding as 16,777,216 x 1,048,576 values"),
        ({"num_attention_heads": 2**16, "kv_lora_rank": 2**20}, "all files together hold"),
        ({"moe_intermediate_size": 2**22}, "an expert as 4,194,304 x 32 values"),
    ],
)
def test_sizes_that_the_files_cannot_have_are_refused_before_anything_is_built(
    directory: Path, change: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moestro.checkpoints.files.Transformer", None)
    monkeypatch.setattr("moestro.checkpoints.files.tensor_map", None)
    change_config(directory, **change)
    with pytest.raises(CheckpointError, match=named):
        ModelFiles(directory)


@pytest.mark.parametrize("said", [0, 3, None, "absent"])
def test_as_many_mtp_modules_are_used_as_there_are(directory: Path, said: Any) -> None:
    change_config(directory, num_nextn_predict_layers=said)
    files = ModelFiles(directory)
    assert files.config.mtp_depth == 1 and files.tree["num_nextn_predict_layers"] == 1
    assert len(files.notices) == 1 and "MTP modules" in files.notices[0]


@pytest.mark.parametrize("quantization", [{"quant_method": "fp8", "fmt": "e4m3"}, {"quant_method": "bitsandbytes"}])
def test_plain_tensors_are_read_as_such_whatever_config_json_says(directory: Path, quantization: Any) -> None:
    expected = ModelFiles(directory).shapes
    change_config(directory, quantization_config=quantization)
    files = ModelFiles(directory)
    assert files.scheme is None and files.shapes == expected and set(files.stored_formats) == {"bf16", "fp32"}
    assert "all tensors hold plain values" in files.notices[0]


def test_a_head_beside_a_tied_embedding_is_used_if_it_differs(directory: Path) -> None:
    """As transformers does: `tie_weights` leaves two matrices alone that are both there and differ."""
    change_config(directory, tie_word_embeddings=True)
    files = ModelFiles(directory)
    assert not files.config.tie_embeddings and "both are used" in files.notices[0]
