"""Model directories: layouts, strict accounting, shards, random weights, refusal of pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_experts import fuse
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moestro.checkpoints import random_weights
from moestro.checkpoints.files import load_model
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config
from moestro.errors import CheckpointError, ConfigError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer

Make = Callable[..., Config]


@pytest.fixture
def directory(make_config: Make, tmp_path: Path) -> Path:
    write_random_model(make_config("model.init_std=0.2").model, tmp_path / "model", seed=3, dtype="fp32")
    return tmp_path / "model"


def logits_of(model: Transformer) -> torch.Tensor:
    tokens = torch.arange(40) * 7 % 300
    with torch.no_grad():
        return model(tokens, AttentionBatch.causal(1, 40), logits=True).logits


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_experts_one_by_one_and_fused_load_equal(directory: Path) -> None:
    before = load_model(directory).state_dict()
    rewrite(directory, fuse)
    after = load_model(directory).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_transformers_saves_loads(directory: Path, tmp_path: Path) -> None:
    theirs = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs.config.num_nextn_predict_layers = 0  # transformers drops the MTP module
    theirs.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        logits_of(load_model(tmp_path / "saved")), logits_of(load_model(directory)), rtol=0, atol=0
    )


def test_published_duplicates_of_mtp_are_accepted(directory: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()

    expected = load_model(directory).embed.weight
    rewrite(directory, add)
    assert torch.equal(load_model(directory).embed.weight, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"layers\.1\.ffn\.experts\.gate_up"),
        (lambda t: t.pop("model.norm.weight"), r"norm\.weight"),
        (
            lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}),
            r"model\.layers\.0\.extra\.weight",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), r"model\.norm\.weight has shape \[5\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight is stored as I8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(directory: Path, change: Callable[..., Any], named: str) -> None:
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=named):
        load_model(directory)


def test_experts_given_twice_are_refused(directory: Path) -> None:
    def both(tensors: dict[str, torch.Tensor]) -> None:
        single = {name: t.clone() for name, t in tensors.items() if ".experts." in name}
        fuse(tensors)
        tensors.update(single)

    rewrite(directory, both)
    with pytest.raises(CheckpointError, match="twice"):
        load_model(directory)


def test_pickled_weights_are_refused_by_name(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled"):
        load_model(directory)


def test_damaged_files_are_named(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_model(directory)


def test_random_weights_are_deterministic_sharded_and_loadable(
    make_config: Make, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_weights, "STREAM_SHARD_BYTES", 60_000)
    config = make_config("model.init_std=0.2").model
    written = write_random_model(config, tmp_path / "sharded", seed=3, dtype="fp32")
    names = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all((tmp_path / "sharded" / name).stat().st_size < 70_000 for name in names)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written["bytes"] == 4 * written["parameters"]
    one, other = load_model(directory).state_dict(), load_model(tmp_path / "sharded").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    write_random_model(config, tmp_path / "another", seed=4, dtype="fp32")
    assert not torch.equal(logits_of(load_model(tmp_path / "another")), logits_of(load_model(directory)))
    (tmp_path / "sharded" / names[1]).unlink()
    with pytest.raises(CheckpointError, match=names[1]):
        load_model(tmp_path / "sharded")


def test_an_index_cannot_point_elsewhere(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        load_model(directory)


def test_stored_precision_is_kept_and_routers_stay_fp32(make_config: Make, tmp_path: Path) -> None:
    write_random_model(make_config().model, tmp_path / "half", seed=0, dtype="bf16")
    model = load_model(tmp_path / "half")
    assert model.dtype == model.embed.weight.dtype == torch.bfloat16
    assert {router.weight.dtype for _, router in model.routers()} == {torch.float32}
    assert {router.bias.dtype for _, router in model.routers()} == {torch.float32}
    assert load_model(tmp_path / "half", torch.float32).embed.weight.dtype == torch.float32


def test_places_in_use_and_unknown_precisions_are_refused(make_config: Make, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        write_random_model(make_config().model, directory, seed=0, dtype="fp32")
    with pytest.raises(ConfigError, match="fp4"):
        write_random_model(make_config().model, tmp_path / "x", seed=0, dtype="fp4")


@pytest.fixture
def saved_by_transformers(tmp_path: Path) -> Path:
    """A directory as `save_pretrained` writes it: bf16, several shards, an MTP module named that is not there."""
    config = DeepseekV3Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=48,
        max_position_embeddings=128, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=None,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_shared_experts=1, n_group=1,
        num_experts_per_tok=2, topk_group=1, moe_intermediate_size=16, num_nextn_predict_layers=1,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


def test_a_directory_saved_by_transformers_loads_as_it_is(saved_by_transformers: Path) -> None:
    model = load_model(saved_by_transformers)
    assert model.dtype == torch.bfloat16 and model.config.mtp_depth == 0


def test_damage_to_a_sharded_directory_is_named(saved_by_transformers: Path) -> None:
    index = saved_by_transformers / "model.safetensors.index.json"
    text = index.read_text("utf-8")
    for shard in sorted(saved_by_transformers.glob("*.safetensors")):
        data = shard.read_bytes()
        shard.write_bytes(data[:50])
        with pytest.raises(CheckpointError, match=shard.name):
            load_model(saved_by_transformers)
        shard.write_bytes(data)
    for damaged in ("{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match="weight_map"):
            load_model(saved_by_transformers)
    index.write_text(text)
    load_model(saved_by_transformers)
