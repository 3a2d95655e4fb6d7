"""Routing schemes in models: presets, which blocks have experts, choices without room, initial weights, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.checkpoints.files import load_model, model_tensors, write_tensors
from moestro.checkpoints.hf import config_to_hf, hf_family, tensor_map
from moestro.checkpoints.hf_config import hf_to_config
from moestro.config import ModelConfig, build_config, load_preset, preset_names
from moestro.errors import ConfigError
from moestro.model.attention import AttentionBatch, Context
from moestro.model.experts import Experts, MoE
from moestro.model.layers import MLP
from moestro.model.rope import rope_tables
from moestro.model.transformer import Transformer, init_weights
from moestro.routing.router import Routes

SCHEMES = preset_names("presets/routers")
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_dim": 32, "num_layers": 5, "num_dense_layers": 1, "dense_dim": 48, "num_heads": 2,
    "kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8, "num_experts": 48, "top_k": 2,
    "num_shared_experts": 1, "expert_dim": 8, "mtp_depth": 1, "max_seq_len": 64,
}  # fmt: skip
UNKNOWN_TO_HF: dict[str, dict[str, Any]] = {
    "hash": {"router": {"selection": "hash"}},
    "hash layers": {"router": {"num_hash_layers": 1}},
    "no gate": {"router": {"selection": "hash", "score": "constant", "balance": []}},
    "learned noise": {"router": {"noise": "learned"}},
    "multiplicative": {"router": {"bias": "multiplicative"}},
    "eval capacity": {"router": {"capacity": {"eval_factor": 2.0}}},
    "moe_every": {"moe_every": 2},
    "sqrt_softplus": {"router": {"score": "sqrt_softplus"}},
    "softmax": {"router": {"score": "softmax"}},
    "group maximum": {"router": {"group_score": "max"}},
    "no shared experts": {"num_shared_experts": 0},
}
KNOWN_TO_HF: dict[str, dict[str, Any]] = {
    "v3": {},
    "jitter": {"router": {"noise": "jitter"}},
    "training capacity": {"router": {"capacity": {"factor": 1.0}, "random_second": True}},
    "error rule": {"router": {"bias": "error"}},
    "no bias": {"router": {"bias": "none", "normalize": False}},
}


def small(**changes: Any) -> ModelConfig:
    return build_config({"model": SMALL | changes}).model


def scheme(name: str) -> ModelConfig:
    """A preset's routing at small widths."""
    return small(**load_preset(name, "presets/routers")["model"])


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    init_weights(model, seed)
    return model


def sample_tokens(length: int = 24) -> Tensor:
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_preset_builds_and_routes_as_it_says(name: str) -> None:
    config = scheme(name)
    assert set(load_preset(name, "presets/routers")) == {"model"}
    model = build(config).eval()
    tokens = sample_tokens()
    with torch.no_grad():
        output = model(tokens, AttentionBatch.causal(1, 24), ahead=[tokens])
        (extra,) = output.ahead
    routes: list[Routes] = [*output.routes, *extra.routes]
    assert len(routes) == len(model.routers()) == config.num_moe_layers
    assert (config.num_experts == 0) == (name == "dense")
    assert bool(output.hidden.isfinite().all())
    for chosen in routes:
        assert chosen.ids.shape == (24, config.top_k)
        assert bool((chosen.ids.sort(-1).values.diff(dim=-1) > 0).all())
        if config.router.normalize:
            torch.testing.assert_close(chosen.weights.sum(-1), torch.full((24,), config.router.scale))


@pytest.mark.parametrize(
    ("every", "dense", "expected"),
    [
        (1, 0, "11111"),
        (1, 1, "01111"),
        (2, 0, "10101"),
        (2, 1, "01010"),
        (4, 0, "10001"),
        (3, 4, "00001"),
        (2, 5, "00000"),
    ],
)
def test_every_so_many_blocks_have_experts_and_those_of_mtp_always(every: int, dense: int, expected: str) -> None:
    config = small(moe_every=every, num_dense_layers=dense, mtp_depth=2)
    model = Transformer(config)
    found = [block.ffn for _, block in model.blocks()]
    assert "".join(str(int(isinstance(ffn, MoE))) for ffn in found) == expected + "11"
    assert all(isinstance(ffn, (MoE, MLP)) for ffn in found)
    assert [name for name, _ in model.routers()] == [
        name for name, block in model.blocks() if isinstance(block.ffn, MoE)
    ]
    assert config.num_moe_layers == expected.count("1") + 2
    assert not any(small(num_experts=0).is_moe(index) for index in range(6))


def ffn_slowly(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


@pytest.mark.parametrize("factor", [0.3, 1.0])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_choice_without_room_contributes_nothing_forward_or_backward(factor: float, shared: int) -> None:
    """h = Shared(x) + the sum over accepted choices alone, token by token; the other weights are not made larger."""
    router = {"capacity": {"factor": factor}, "bias": "none"}
    config = small(num_experts=4, num_shared_experts=shared, router=router)
    layer = MoE(config, 1, Experts(config, "fp32"), "fp32")
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    batch = AttentionBatch.causal(1, 20)
    out, routes = layer(x, Context(sample_tokens(20), rope_tables(config, batch.positions), batch))
    assert routes.accepted is not None and 0 < int(routes.overflow) == int((~routes.accepted).sum())
    rows = []
    for token in range(20):
        row = torch.zeros(32)
        for choice in range(config.top_k):
            if routes.accepted[token, choice]:
                expert = routes.ids[token, choice]
                y = ffn_slowly(x[token], layer.experts.gate_up[expert], layer.experts.down[expert])
                row = row + routes.weights[token, choice] * y
        if layer.shared is not None:
            row = row + ffn_slowly(x[token], layer.shared.gate_up.weight, layer.shared.down.weight)
        rows.append(row)
    slow = torch.stack(rows)
    torch.testing.assert_close(out, slow, rtol=1e-4, atol=1e-5)
    probe = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((slow * probe).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    none = ~routes.accepted.any(-1)
    assert factor == 1.0 or bool(none.any())
    if not shared:
        assert not bool(out[none].any()) and not bool(ours[0][none].any())


def test_capacity_counts_the_choices_of_the_whole_forward_pass() -> None:
    config = small(num_experts=4, top_k=1, router={"capacity": {"eval_factor": 1.0}})
    model = build(config).eval()
    with torch.no_grad():
        routes = model(sample_tokens(24), AttentionBatch.causal(2, 12)).routes
    for chosen in routes:
        assert chosen.accepted is not None
        loads = torch.bincount(chosen.ids[chosen.accepted], minlength=4)
        asked = torch.bincount(chosen.ids.flatten(), minlength=4)
        assert loads.tolist() == [min(6, count) for count in asked.tolist()]


def test_hash_layers_follow_tokens_and_other_layers_the_context() -> None:
    """The same tokens in another order: hashed layers give each its own experts again, the others do not all."""
    config = small(num_dense_layers=1, router={"score": "sqrt_softplus", "num_hash_layers": 2, "scale": 1.5})
    model = build(config).eval()
    tokens, order = sample_tokens(), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    batch = AttentionBatch.causal(1, 24)
    with torch.no_grad():
        first, second = model(tokens, batch).routes, model(tokens[order], batch).routes
    same = [
        torch.equal(a.ids[order].sort(-1).values, b.ids.sort(-1).values) for a, b in zip(first, second, strict=True)
    ]
    assert same == [True, True, False, False]
    assert [router.hashed for _, router in model.routers()] == [True, True, False, False, False]
    assert not torch.equal(first[0].ids, first[1].ids)


def test_scaled_initialisation_is_a_normal_cut_at_two_deviations() -> None:
    """Switch §2.4: σ = √(s / inputs); a normal cut at ±2σ has 0.8796 of its deviation."""
    model = build(small(hidden_dim=64, expert_dim=32, init_scale=0.1))
    phi = math.exp(-2) / math.sqrt(2 * math.pi)
    kept = math.sqrt(1 - 4 * phi / math.erf(math.sqrt(2)))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == 1).all()), name
            continue
        sigma = math.sqrt(0.1 / parameter.shape[-1])
        values = parameter.detach().double()
        assert float(values.abs().max()) <= 2 * sigma * 1.00001, name
        error = 5 / math.sqrt(2 * values.numel())
        assert float(values.std()) == pytest.approx(kept * sigma, rel=error), name
        assert float(values.mean()) == pytest.approx(0.0, abs=5 * sigma / math.sqrt(values.numel())), name


def test_learned_noise_starts_with_both_matrices_at_zero() -> None:
    for _, router in build(scheme("shazeer")).routers():
        assert router.weight is not None and router.noise is not None
        assert not bool(router.weight.any()) and not bool(router.noise.any())
    for _, router in build(scheme("switch")).routers():
        assert router.noise is None and router.weight is not None and bool(router.weight.any())


@pytest.mark.parametrize("changes", UNKNOWN_TO_HF.values(), ids=UNKNOWN_TO_HF)
def test_schemes_that_hugging_face_cannot_run_say_so_and_come_back(changes: dict[str, Any]) -> None:
    config = small(**changes)
    assert hf_family(config) is None
    tree = config_to_hf(config, bos_id=1, eos_id=2, dtype="float32")
    assert tree["model_type"] == "moestro"
    assert hf_to_config(tree) == config


@pytest.mark.parametrize("changes", KNOWN_TO_HF.values(), ids=KNOWN_TO_HF)
def test_schemes_that_differ_in_training_alone_stay_hugging_face_models(changes: dict[str, Any]) -> None:
    config = small(**changes)
    assert hf_family(config) == "deepseek_v3"
    assert config_to_hf(config, bos_id=1, eos_id=2, dtype="float32")["model_type"] == "deepseek_v3"


@pytest.mark.parametrize("name", SCHEMES)
def test_every_tensor_of_a_scheme_has_a_name_and_comes_back(name: str, tmp_path: Path) -> None:
    config = scheme(name)
    tree = config_to_hf(config, bos_id=1, eos_id=2, dtype="float32")
    assert hf_to_config(tree) == config or hf_family(config) == "deepseek_v3"
    model = build(config)
    for number, (_, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
        tensor.data.normal_(generator=torch.Generator().manual_seed(number))  # zero matrices and biases too
    assert {slot.parameter for slot in tensor_map(config).values()} == set(model.state_dict())
    write_tensors(tmp_path, model_tensors(model))
    (tmp_path / "config.json").write_text(json.dumps(tree), "utf-8")
    loaded = load_model(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert any(key.endswith("router.noise") for key in state) == (config.router.noise == "learned")
    tokens, batch = sample_tokens(), AttentionBatch.causal(1, 24)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens, batch).hidden, loaded(tokens, batch).hidden)


def test_impossible_schemes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'load'.*noise='learned'"):
        small(router={"balance": [{"kind": "load", "weight": 0.1}]})
    load = {"noise": "learned", "balance": [{"kind": "load", "weight": 0.1}]}
    with pytest.raises(ConfigError, match="'load' needs top_k below num_experts"):
        small(num_experts=4, top_k=4, router=load)
    with pytest.raises(ConfigError, match="top2"):
        small(num_experts=4, num_groups=4, top_k_groups=2)
    with pytest.raises(ConfigError, match="kind"):
        small(router={"balance": [{"kind": "experts", "weight": 0.1}]})
