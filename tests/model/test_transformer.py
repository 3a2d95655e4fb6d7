"""The one call of the model: replayed routes, targets, devices, compilation, and initial values by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from moestro import ops
from moestro.config import Config
from moestro.model.attention import AttentionBatch, Context
from moestro.model.rope import rope_tables
from moestro.model.transformer import Targets, Transformer, init_weights, initial_value

Make = Callable[..., Config]
SHAPES = [
    pytest.param([], id="mla"),
    pytest.param(["model.q_lora_rank=12", "model.num_groups=2", "model.top_k_groups=1"], id="q-lora, groups"),
    pytest.param(["model.attention=gqa", "model.num_kv_heads=1"], id="gqa"),
]


def build(make_config: Make, *overrides: str) -> Transformer:
    model = Transformer(make_config("model.init_std=0.2", *overrides).model)
    init_weights(model, 0)
    for _, router in model.routers():
        router.bias.copy_(torch.linspace(-1, 0.2, len(router.bias)))
    return model


def sample(length: int = 40, seed: int = 3) -> tuple[Tensor, AttentionBatch]:
    tokens = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed))
    return tokens, AttentionBatch.packed(torch.tensor([[0] * 7 + [1] * (length - 7)]))


def context_of(model: Transformer, tokens: Tensor, batch: AttentionBatch) -> Context:
    return Context(tokens, rope_tables(model.config, batch.positions), batch)


def gradients(model: Transformer, output: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output.hidden.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_replaying_its_own_routes_changes_no_bit(make_config: Make) -> None:
    model = build(make_config, "model.mtp_depth=1")
    tokens, batch = sample()
    ahead = [tokens.roll(-1)]
    first = model(tokens, batch, ahead=ahead)
    ids = [routes.ids for routes in (*first.routes, *first.ahead[0].routes)]
    again = model(tokens, batch, ahead=ahead, replay=ids)
    assert torch.equal(first.hidden, again.hidden) and torch.equal(first.ahead[0].hidden, again.ahead[0].hidden)
    ours, theirs = gradients(model, first), gradients(model, again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_routes_are_used_as_given_and_weighed_by_the_layers_own_scores(make_config: Make) -> None:
    model = build(make_config)
    tokens, batch = sample()
    own = model(tokens, batch).routes
    given = [(routes.ids + 1) % model.config.num_experts for routes in own]
    output = model(tokens, batch, replay=given)
    for routes, ids in zip(output.routes, given, strict=True):
        assert torch.equal(routes.ids, ids)
        picked = routes.scores.gather(1, ids)
        expected = picked / picked.sum(-1, keepdim=True) * model.config.router.scale
        torch.testing.assert_close(routes.weights, expected)
    (_, router), *_ = model.routers()
    assert router.weight is not None
    gradient = gradients(model, output)["layers.1.ffn.router.weight"]
    assert float(gradient.abs().max()) > 0


def test_targets_are_scored_as_the_logits_say(make_config: Make) -> None:
    model = build(make_config, "model.mtp_depth=1")
    tokens, batch = sample()
    weights = torch.linspace(-1, 1, len(tokens))
    later = tokens.roll(-1)
    output = model(tokens, batch, ahead=[later], targets=[Targets(later, weights), Targets(tokens)], logits=True)
    assert output.scores is not None and output.logits is not None and model.head is not None
    nll = -output.logits.log_softmax(-1).gather(1, later[:, None])[:, 0]
    torch.testing.assert_close(output.scores.nll, nll.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.scores.total, (nll * weights).sum(), rtol=1e-4, atol=1e-4)
    extra = output.ahead[0]
    nll = -model.head(extra.hidden).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert extra.scores is not None
    torch.testing.assert_close(extra.scores.total, nll.sum(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 sequences ahead and 0 targets for a model of 1 MTP modules"):
        model(tokens, batch, ahead=[later, later])


@pytest.mark.parametrize("overrides", SHAPES)
def test_a_block_compiles_without_breaks(make_config: Make, overrides: list[str]) -> None:
    model = build(make_config, *overrides)
    tokens, batch = sample()
    context, block = context_of(model, tokens, batch), model.layers[1]
    x = torch.randn(len(tokens), model.config.hidden_dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for function in (block, compiled):
        out, routes = function(x, context)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, routes.ids, gradient))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain)


class PlainIndexing(TorchFunctionMode):
    """Indexing as single operators: Python's own asks the CUDA driver, which a CPU build of torch does not have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, Tensor) for part in index):
            assert len(index) == 1, "one tensor, of whole numbers"
            return torch.index_select(x, 0, index[0].flatten()).unflatten(0, index[0].shape)
        left = x.dim() - sum(part is not None and part is not Ellipsis for part in index)
        parts = [p for part in index for p in ([slice(None)] * left if part is Ellipsis else [part])]
        dim = 0
        for part in parts:
            if part is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(part, int):
                x = x.select(dim, part)
            else:
                x, dim = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1), dim + 1
        return x


@pytest.mark.parametrize("overrides", SHAPES)
def test_a_forward_pass_runs_on_fake_cuda_tensors(make_config: Make, overrides: list[str]) -> None:
    """Everything is made where its inputs are, and nothing is read back."""
    config = make_config("model.mtp_depth=1", *overrides).model
    with FakeTensorMode(), torch.no_grad(), PlainIndexing():
        with torch.device("cuda"):
            model = Transformer(config, "bf16")
            tokens = torch.zeros(40, dtype=torch.int64)
            batch = AttentionBatch.causal(2, 20, device="cuda")
        output = model(tokens, batch, ahead=[tokens], targets=[Targets(tokens), Targets(tokens)], logits=True)
    assert output.scores is not None
    found = [output.hidden, output.logits, output.scores.nll, output.ahead[0].hidden, *(r.ids for r in output.routes)]
    assert {tensor.device.type for tensor in found} == {"cuda"}


def test_initial_values_depend_on_the_seed_the_name_and_the_expert_alone(make_config: Make) -> None:
    config = make_config("model.mtp_depth=1").model
    model, other = Transformer(config), Transformer(config.model_copy(update={"num_layers": config.num_layers - 1}))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    init_weights(model, 5)
    init_weights(other, 5)
    assert torch.equal(state, torch.random.get_rng_state())
    parameters = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
        assert torch.equal(parameter, initial_value(name, parameter.shape, config, 5))
    stack = parameters["layers.1.ffn.experts.down"]
    assert torch.equal(stack[3], initial_value("layers.1.ffn.experts.down.3", stack.shape[1:], config, 5))
    assert not torch.equal(stack[0], stack[1])
    matrix = parameters["embed.weight"]
    assert float(matrix.detach().std()) == pytest.approx(config.init_std, rel=0.05)
    assert not torch.equal(matrix, initial_value("embed.weight", matrix.shape, config, 6))


def test_experts_are_given_to_the_layer(make_config: Make) -> None:
    """Any module that maps (x, routes) to [N, D] may stand behind the routes."""

    class Doubled(torch.nn.Module):
        def __init__(self, config: Any, precision: Any) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, routes: Any) -> Tensor:
            return x * self.scale * routes.weights.sum(-1, keepdim=True).to(x.dtype)

    config = make_config("model.num_shared_experts=0").model
    model = Transformer(config, make_experts=Doubled)
    layer = model.layers[1].ffn
    x = torch.randn(5, config.hidden_dim, generator=torch.Generator().manual_seed(1))
    batch = AttentionBatch.causal(1, 5)
    with torch.no_grad():
        layer.router.weight.normal_(generator=torch.Generator().manual_seed(2))
    out, routes = layer(x, context_of(model, torch.zeros(5, dtype=torch.int64), batch))
    torch.testing.assert_close(out, x * routes.weights.sum(-1, keepdim=True))
    assert ops.linear is not None
