"""Model types that are DeepSeek-V2 or V3 by another name, against transformers' own class of each.

transformers makes a tiny random model and saves it; the directory is read as it is. Logits, routes and greedy text must
agree. Norms of latents have an epsilon of their own (1e-6), so inputs are kept small and `rms_norm_eps` is 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

from moestro.checkpoints.convert import convert
from moestro.checkpoints.files import ModelFiles, load_model
from moestro.checkpoints.packed import PackedFiles
from moestro.checkpoints.packing import choose_format, pack_model
from moestro.engine.engine import Engine
from moestro.engine.language_model import pack
from moestro.engine.runtime import Runtime
from moestro.engine.sequence import Request, SamplingParams
from moestro.model.attention import AttentionBatch

DENSE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SPARSE = DENSE | {
    "moe_intermediate_size": 12, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
}  # fmt: skip
V3 = SPARSE | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
GLM_ROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 1.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
TYPES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> transformers' model type, and its configuration
    "glm": ("glm4_moe_lite", SPARSE | {"rope_parameters": GLM_ROPE}),
    "glm, direct queries": ("glm4_moe_lite", SPARSE | {"q_lora_rank": None, "norm_topk_prob": False}),
    "glm, two dense": ("glm4_moe_lite", SPARSE | {"mlp_layer_types": ["dense", "dense", "sparse"]}),
    "youtu": ("youtu", DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1.6e6}}),
    "youtu, untied": ("youtu", DENSE | {"tie_word_embeddings": False, "q_lora_rank": None}),
    "kimi-k2": ("deepseek_v3", V3 | {"rope_parameters": YARN, "routed_scaling_factor": 2.827}),
}


def randomise(model: PreTrainedModel) -> None:
    """Norms and biases of routers that are not what they are at the start, and a small embedding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 - 0.6)
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "embed_tokens" in name:
                tensor.mul_(0.01)


def make(model_type: str, settings: dict[str, Any], directory: Path) -> PreTrainedModel:
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomise(model)
    model.save_pretrained(directory)
    return model


def sample_tokens() -> torch.Tensor:
    return torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(3))


def their_routes(model: PreTrainedModel) -> list[torch.Tensor]:
    """Chosen experts of the next forward pass, in the order of layers."""
    chosen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _module, _inputs, out: chosen.append(out[2]))
    return chosen


def check_logits(directory: Path, theirs: Callable[[torch.Tensor], torch.Tensor], chosen: list[torch.Tensor]) -> None:
    tokens = sample_tokens()
    ours = load_model(directory)
    with torch.inference_mode():
        expected = theirs(tokens).flatten(0, 1)
        output = ours(tokens.flatten(), AttentionBatch.causal(*tokens.shape), logits=True)
    torch.testing.assert_close(output.logits, expected, rtol=2e-5, atol=2e-5)
    assert len(output.routes) == len(chosen)
    for routes, ids in zip(output.routes, chosen, strict=True):
        assert torch.equal(routes.ids.sort(-1).values, ids.sort(-1).values)


def write_greedily(source: Any, prompt: list[int], count: int) -> list[int]:
    runtime = Runtime(pack_model(source, None if isinstance(source, PackedFiles) else choose_format(source, None)))
    engine = Engine(runtime, None, frozenset([1]), max_running=1)  # type: ignore[arg-type]
    events = engine.stream(Request(prompt, SamplingParams(max_tokens=count)))
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("name", TYPES)
def test_logits_and_greedy_text_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model_type, settings = TYPES[name]
    theirs = make(model_type, settings, tmp_path / "model")
    if name == "kimi-k2":
        rename_type(tmp_path / "model", "kimi_k2")
    chosen = their_routes(theirs)
    check_logits(tmp_path / "model", lambda tokens: theirs(tokens).logits, chosen)
    prompt = sample_tokens()[:1]
    expected = theirs.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=1, pad_token_id=1)[0, 20:]
    files = ModelFiles(tmp_path / "model")
    assert write_greedily(files, prompt[0].tolist(), 16) == expected.tolist()
    pack(tmp_path / "model", tmp_path / "packed")
    assert write_greedily(PackedFiles(tmp_path / "packed"), prompt[0].tolist(), 16) == expected.tolist()


def rename_type(directory: Path, model_type: str) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))


@pytest.fixture
def kimi_k25(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A tiny Kimi-K2.5 with its vision tower, as transformers saves it: under the names of the release."""
    text = V3 | {"model_type": "deepseek_v3", "rope_parameters": YARN, "tie_word_embeddings": False}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "patch_size": 2, "pos_emb_height": 2, "pos_emb_width": 2}  # fmt: skip
    torch.manual_seed(7)
    config = Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=16, image_token_id=0,
                            video_token_id=1, tie_word_embeddings=False)  # fmt: skip
    model = Kimi_K25ForConditionalGeneration(config).float().eval()
    randomise(model)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.mark.parametrize("layers", ["blocks", "layers"], ids=["saved by transformers", "release"])
def test_the_text_part_of_kimi_k25_is_read_and_converts_alone(
    kimi_k25: tuple[Path, PreTrainedModel], layers: str, tmp_path: Path
) -> None:
    directory, theirs = kimi_k25
    tensors = load_file(directory / "model.safetensors")
    assert any(name.startswith("vision_tower.") for name in tensors)
    named = {name.replace("model.model.blocks", f"model.model.{layers}"): tensor for name, tensor in tensors.items()}
    save_file(named, directory / "model.safetensors", {"format": "pt"})
    check_logits(directory, lambda tokens: theirs(input_ids=tokens).logits, their_routes(theirs))
    files = ModelFiles(directory)
    assert any("reads text alone" in text for text in files.notices)
    convert(files, tmp_path / "text", "bf16")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32, attn_implementation="eager")
    tokens = sample_tokens()
    with torch.inference_mode():
        expected = alone(tokens).logits.flatten(0, 1)
        output = load_model(tmp_path / "text", torch.float32)(
            tokens.flatten(), AttentionBatch.causal(*tokens.shape), logits=True
        )
    torch.testing.assert_close(output.logits, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("style", ["release", "transformers 5"])
def test_the_text_part_of_kimi_vl_is_read(style: str, tmp_path: Path) -> None:
    """transformers has no class for Kimi-VL; its text part is DeepSeek-V3, under names of its own."""
    theirs = make("deepseek_v3", V3 | {"q_lora_rank": None}, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    prefix = "language_model." if style == "release" else ""
    inner = "model." if style == "release" else "model.language_model."
    renamed = {rename(name, prefix, inner): tensor for name, tensor in tensors.items()}
    others = {
        f"{part}.weight": torch.ones(2, 2) for part in ("vision_tower.patch_embed.proj", "multi_modal_projector.1")
    }
    save_file(renamed | others, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    text = json.loads((tmp_path / "model" / "config.json").read_text())
    tree = {"model_type": "kimi_vl", "architectures": ["KimiVLForConditionalGeneration"], "text_config": text,
            "vision_config": {"model_type": "moonvit"}, "media_placeholder_token_id": 90}  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(tree))
    check_logits(tmp_path / "model", lambda tokens: theirs(tokens).logits, their_routes(theirs))


def rename(name: str, prefix: str, inner: str) -> str:
    if name.startswith("model."):
        return f"{prefix}{inner}{name.removeprefix('model.')}"
    return f"{prefix}{name}"
