"""The whole model against Hugging Face's DeepseekV3: logits, routes, every gradient, twenty training steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from moestro.checkpoints.hf import config_to_hf, tensor_map
from moestro.config import ModelConfig, build_config
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer, init_weights

SMALL = {
    "vocab_size": 97, "hidden_dim": 32, "num_layers": 3, "num_dense_layers": 1, "dense_dim": 48, "num_heads": 2,
    "kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 12, "num_experts": 16, "top_k": 4, "expert_dim": 12,
    "num_shared_experts": 2, "max_seq_len": 64, "init_std": 0.2,
}  # fmt: skip
YARN = {"factor": 8.0, "original_max_seq_len": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
SHAPES: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": 12},
    {"num_groups": 4, "top_k_groups": 2},
    {"q_lora_rank": 12, "num_groups": 4, "top_k_groups": 2, "rope": YARN, "mtp_depth": 1},
    {"rope": YARN, "num_dense_layers": 0, "router": {"normalize": False, "scale": 1.5}},
    {"num_dense_layers": 3, "num_shared_experts": 1},
]


def small_config(**changes: Any) -> ModelConfig:
    return build_config({"model": SMALL | changes}).model


def build_pair(config: ModelConfig, seed: int = 0) -> tuple[Transformer, DeepseekV3ForCausalLM]:
    """Our model and Hugging Face's with the same random weights and non-zero, mostly negative biases."""
    ours = Transformer(config)
    init_weights(ours, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for _, router in ours.routers():
        router.bias.copy_(torch.randn(config.num_experts, generator=generator) * 0.3 - 0.6)
    for norm in (p for p in ours.parameters() if p.dim() == 1):
        norm.data.uniform_(0.5, 1.5, generator=generator)
    theirs = build_hf(config)
    copy_to_hf(ours, theirs)
    return ours, theirs


def build_hf(config: ModelConfig) -> DeepseekV3ForCausalLM:
    tree = config_to_hf(config, bos_id=0, eos_id=1, dtype="float32")
    hf_config = DeepseekV3Config(**tree, attn_implementation="eager", experts_implementation="eager")
    return DeepseekV3ForCausalLM(hf_config).float().train()


def copy_to_hf(ours: Transformer, theirs: DeepseekV3ForCausalLM) -> None:
    state = theirs.state_dict()
    parameters = dict(ours.named_parameters()) | dict(ours.named_buffers())
    with torch.no_grad():
        for name, view in hf_views(state, ours.config):
            slot = tensor_map(ours.config)[name]
            value = parameters[slot.parameter]
            value = value if slot.expert is None else value[slot.expert]
            view.copy_(value if slot.stop is None else value[slot.start : slot.stop])


def hf_views(state: dict[str, torch.Tensor], config: ModelConfig) -> list[tuple[str, torch.Tensor]]:
    """Hugging Face's own tensors under checkpoint names: fused experts are cut into one view per expert."""
    views = []
    for name, tensor in state.items():
        layer, _, kind = name.partition(".mlp.experts.")
        if not kind:
            views.append((name, tensor))
            continue
        for expert, matrix in enumerate(tensor):
            prefix = f"{layer}.mlp.experts.{expert}"
            if kind == "down_proj":
                views.append((f"{prefix}.down_proj.weight", matrix))
            else:
                views.append((f"{prefix}.gate_proj.weight", matrix[: config.expert_dim]))
                views.append((f"{prefix}.up_proj.weight", matrix[config.expert_dim :]))
    return views


def sample_tokens(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def hf_routes(model: DeepseekV3ForCausalLM) -> tuple[list[torch.Tensor], list[Any]]:
    """Chosen experts of every MoE layer of the next forward pass, through hooks on Hugging Face's own routers."""
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
        for layer in model.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    return chosen, hooks


@pytest.mark.parametrize("changes", SHAPES, ids=lambda c: ",".join(c) or "plain")
def test_logits_routes_and_gradients_match(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    ours, theirs = build_pair(config)
    tokens = sample_tokens(3, 20)
    chosen, _ = hf_routes(theirs)
    expected = theirs(tokens).logits.flatten(0, 1)
    output = ours(tokens.flatten(), AttentionBatch.causal(*tokens.shape), logits=True)
    logits = output.logits
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    assert len(chosen) == len(output.routes)
    for their_ids, routes in zip(chosen, output.routes, strict=True):
        assert torch.equal(routes.ids.sort(-1).values, their_ids.sort(-1).values)

    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    their_gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for name, view in hf_views(their_gradients, config):
        slot = tensor_map(config)[name]
        value = gradients[slot.parameter]
        value = value if slot.expert is None else value[slot.expert]
        value = value if slot.stop is None else value[slot.start : slot.stop]
        scale = float(view.abs().max()) + 1e-6
        torch.testing.assert_close(value, view, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 12, "num_groups": 4, "top_k_groups": 2, "rope": YARN}])
def test_mtp_logits_match(changes: dict[str, Any]) -> None:
    """Against Hugging Face's own MTP layer, given the main model's hidden states and the tokens one ahead."""
    config = small_config(mtp_depth=1, num_dense_layers=0, **changes)
    ours, theirs = build_pair(config)
    mtp = MtpModel(theirs, 1).float()
    parameters = dict(ours.named_parameters()) | dict(ours.named_buffers())
    prefix = f"model.layers.{config.num_layers}."
    with torch.no_grad():
        for name, view in hf_views(mtp.layers[0].state_dict(), config):
            inner = name.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
            slot = tensor_map(config)[prefix + inner]
            value = parameters[slot.parameter]
            value = value if slot.expert is None else value[slot.expert]
            view.copy_(value if slot.stop is None else value[slot.start : slot.stop])
    tokens = sample_tokens(1, 15)
    length = tokens.shape[1] - 1
    main = theirs.model(tokens[:, :-1]).last_hidden_state
    positions = torch.arange(1, length + 1)[None]
    causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
    their_hidden = mtp.layers[0](
        theirs.model.embed_tokens(tokens[:, 1:]),
        main,
        theirs.model.rotary_emb(main, positions),
        causal,
        positions,
        None,
    )
    batch = AttentionBatch.causal(1, length)
    (output,) = ours(tokens[0, :-1], batch, ahead=[tokens[0, 1:]]).ahead
    assert ours.head is not None
    torch.testing.assert_close(ours.head(output.hidden), theirs.lm_head(their_hidden)[0], rtol=2e-5, atol=2e-5)
    assert len(output.routes) == 1


def test_packed_documents_match_documents_alone() -> None:
    ours, theirs = build_pair(small_config(q_lora_rank=12, num_groups=4, top_k_groups=2))
    tokens = sample_tokens(1, 30)
    segments = torch.tensor([[0] * 7 + [1] * 1 + [2] * 22])
    packed = ours(tokens.flatten(), AttentionBatch.packed(segments), logits=True).logits
    alone = torch.cat([theirs(part).logits[0] for part in tokens.split([7, 1, 22], dim=1)])
    torch.testing.assert_close(packed, alone, rtol=2e-5, atol=2e-5)


def test_twenty_training_steps_match() -> None:
    config = small_config(q_lora_rank=12, num_groups=4, top_k_groups=2, init_std=0.05)
    ours, theirs = build_pair(config)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1) for m in (ours, theirs)]
    losses = []
    for step in range(20):
        first = sample_tokens(4, 1, seed=step)
        tokens = (first + 5 * torch.arange(17)) % SMALL["vocab_size"]  # learnable: every next token is 5 more
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
        our_logits = ours(inputs.flatten(), AttentionBatch.causal(*inputs.shape), logits=True).logits
        their_logits = theirs(inputs).logits.flatten(0, 1)
        pair = []
        for optimizer, logits in zip(optimizers, (our_logits, their_logits), strict=True):
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pair.append(float(loss.detach()))
        losses.append(pair)
    ours_curve, theirs_curve = zip(*losses, strict=True)
    assert ours_curve == pytest.approx(theirs_curve, abs=1e-4)
    assert ours_curve[-1] < ours_curve[0]
