"""The whole model against Hugging Face's DeepseekV2: directories, logits, routes, greedy text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from moestro.checkpoints.files import load_model, read_config
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import ModelConfig, build_config
from moestro.model.attention import AttentionBatch

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_dim": 32, "num_layers": 3, "num_dense_layers": 1, "dense_dim": 48, "num_heads": 2,
    "kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 12, "num_experts": 16, "top_k": 4, "expert_dim": 12,
    "num_shared_experts": 2, "max_seq_len": 64, "init_std": 0.2,
}  # fmt: skip
ROUTER = {"score": "softmax", "group_score": "max", "normalize": False, "bias": "none", "balance": []}
YARN = {"factor": 8.0, "original_max_seq_len": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
SHAPES: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": 12, "router": ROUTER | {"scale": 16.0}},
    {"num_groups": 4, "top_k_groups": 2},
    {"num_groups": 4, "top_k_groups": 3, "q_lora_rank": 12, "rope": YARN},
]


def small_config(**changes: Any) -> ModelConfig:
    return build_config({"model": SMALL | {"router": ROUTER} | changes}).model


@pytest.mark.parametrize("changes", SHAPES, ids=lambda c: ",".join(c) or "lite")
def test_a_directory_computes_the_same_in_both(changes: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(**changes)
    write_random_model(config, tmp_path / "model", seed=3, dtype="fp32")
    assert read_config(tmp_path / "model").router.score == "softmax"
    ours = load_model(tmp_path / "model")
    theirs = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").float().eval()
    chosen: list[torch.Tensor] = []
    for layer in theirs.model.layers[config.num_dense_layers :]:
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, out: chosen.append(out[2]))
    tokens = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens).logits.flatten(0, 1)
        output = ours(tokens.flatten(), AttentionBatch.causal(*tokens.shape), logits=True)
        torch.testing.assert_close(output.logits, expected, rtol=2e-5, atol=2e-5)
    assert len(chosen) == len(output.routes) == 2
    for their_ids, routes in zip(chosen, output.routes, strict=True):
        assert torch.equal(routes.ids.sort(-1).values, their_ids.sort(-1).values)
