"""The served model against the training forward pass: every attention, router, precision and format of weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from moestro.checkpoints.packing import pack_model
from moestro.config import Config
from moestro.engine.paged_cache import PagedCache
from moestro.engine.runtime import Runtime
from moestro.engine.scheduler import pages_for
from moestro.errors import ConfigError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer, init_weights
from moestro.ops.precision import precision_of

Make = Callable[..., Config]
SCHEMES = {
    "mla": [],
    "q-lora, groups": ["model.q_lora_rank=12", "model.num_groups=4", "model.top_k_groups=2"],
    "yarn": ["model.rope.factor=8", "model.rope.original_max_seq_len=64", "model.rope.mscale_all_dim=0.7"],
    "dense": ["model.num_experts=0", "model.num_shared_experts=0", "model.mtp_depth=0"],
    "v2": ["model.router.score=softmax", "model.router.group_score=max", "model.router.normalize=false"],
    "v4": ["model.router.score=sqrt_softplus", "model.router.num_hash_layers=1"],
    "hash": [
        "model.router.selection=hash",
        "model.router.score=constant",
        "model.router.bias=none",
        "model.router.balance=[]",
    ],
    "tied, no shared expert": ["model.tie_embeddings=true", "model.num_shared_experts=0"],
    "mha": ["model.attention=mha", "model.num_heads=4"],
    "gqa": ["model.attention=gqa", "model.num_heads=4", "model.num_kv_heads=2"],
    "mqa": ["model.attention=mqa", "model.num_heads=4"],
}


def make_model(make_config: Make, *overrides: str, dtype: torch.dtype = torch.float32) -> Transformer:
    config = make_config("model.init_std=0.2", "model.max_seq_len=4096", *overrides).model
    model = Transformer(config, precision_of(dtype)).eval()
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    for _, router in model.routers():
        if config.router.bias != "none":
            router.bias.copy_(torch.randn(len(router.bias), generator=generator) * 0.2 - 0.5)
    return model


def random_tokens(count: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@torch.inference_mode()
def serve(
    runtime: Runtime, tokens: list[int], cuts: list[int], given: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states [N, D] and expert ids of one sequence computed in parts, over pages in no particular order.

    `given`: expert ids [L, N, A] to be replayed.
    """
    num_pages = pages_for(len(tokens))
    cache, pages = PagedCache(runtime.config, num_pages, runtime.dtype), list(range(num_pages))[::-1]
    parts = []
    for first, last in itertools.pairwise([0, *cuts, len(tokens)]):
        routes = None if given is None else given[:, first:last]
        parts.append(runtime.forward(cache.prepare([(tokens[first:last], first, pages)]), cache, routes))
    ids = [torch.cat(layer) for layer in zip(*(part.ids for part in parts), strict=True)]
    return torch.cat([part.hidden for part in parts]), ids


@pytest.mark.parametrize("overrides", SCHEMES.values(), ids=SCHEMES)
@torch.inference_mode()
def test_every_scheme_computes_what_it_was_trained_as(make_config: Make, overrides: list[str]) -> None:
    model, tokens = make_model(make_config, *overrides), random_tokens(80)
    expected = model(torch.tensor(tokens), AttentionBatch.causal(1, len(tokens)), logits=True)
    runtime = Runtime(pack_model(model))
    hidden, ids = serve(runtime, tokens, [60, 61, 62, 66])
    torch.testing.assert_close(hidden, expected.hidden, rtol=1e-4, atol=1e-4)
    assert len(ids) == len(expected.routes)
    for ours, routes in zip(ids, expected.routes, strict=True):
        assert torch.equal(ours.sort(-1).values, routes.ids.sort(-1).values)
    torch.testing.assert_close(runtime.logits(hidden), expected.logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cached", [1, 63, 64, 65, 500, 2500])
@torch.inference_mode()
def test_absorbed_over_pages_equals_naive_over_the_whole(make_config: Make, cached: int) -> None:
    """Latents as keys and values of all heads, or keys and values expanded from them: one function."""
    model, tokens = make_model(make_config, "model.q_lora_rank=12"), random_tokens(cached + 3)
    expected = model(torch.tensor(tokens), AttentionBatch.causal(1, len(tokens))).hidden
    hidden, _ = serve(Runtime(pack_model(model)), tokens, [cached, cached + 1])
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_mtp_modules_compute_what_they_were_trained_as(make_config: Make) -> None:
    model, tokens = make_model(make_config, "model.mtp_depth=2"), random_tokens(70)
    length = len(tokens) - 2
    batch = AttentionBatch.causal(1, length)
    ahead = [torch.tensor(tokens[k : k + length]) for k in (1, 2)]
    expected = model(torch.tensor(tokens[:length]), batch, ahead=ahead).ahead
    runtime, pages = Runtime(pack_model(model)), list(range(pages_for(length)))
    cache = PagedCache(model.config, len(pages), runtime.dtype)
    hidden = runtime.forward(cache.prepare([(tokens[:length], 0, pages)]), cache).hidden
    for depth, output in enumerate(expected):
        step = cache.prepare([(tokens[1 + depth : 1 + depth + length], 0, pages)])
        hidden = runtime.forward_mtp(depth, hidden, step, cache)
        torch.testing.assert_close(hidden, output.hidden, rtol=1e-4, atol=1e-4)


# What the test below measures for a format of weights and a precision of activations, the largest of AVX2, AVX-512,
# AVX-512 BF16 and plain torch: mean |Δ log p| in nats and the share of choices of experts that differ; then, with the
# routes of the trained pass replayed, mean and largest |Δ log p|.
DISTANCES = {
    ("fp32", torch.float32): (2.2e-7, 0.0, 2.2e-7, 1.9e-6),
    ("bf16", torch.float32): (0.0026, 0.002, 0.0018, 0.019),
    ("int8", torch.float32): (0.0114, 0.007, 0.0087, 0.087),
    ("int4", torch.float32): (0.096, 0.055, 0.078, 0.72),
    ("fp32", torch.bfloat16): (0.0059, 0.005, 0.0037, 0.039),
    ("bf16", torch.bfloat16): (0.0059, 0.005, 0.0037, 0.039),
    ("int8", torch.bfloat16): (0.0156, 0.012, 0.0094, 0.096),
    ("int4", torch.bfloat16): (0.096, 0.055, 0.080, 0.76),
}


@pytest.mark.parametrize(("format", "dtype"), DISTANCES)
@torch.inference_mode()
def test_serving_is_within_twice_the_measured_distance_of_training(
    make_config: Make, format: str, dtype: torch.dtype
) -> None:
    """Between these random weights' own log-probabilities lie 0.9 nats. Large changes come from other experts."""
    model, tokens = make_model(make_config, "model.init_std=0.1", dtype=dtype), random_tokens(400)
    expected = model(torch.tensor(tokens), AttentionBatch.causal(1, len(tokens)), logits=True)
    logprobs = expected.logits.float().log_softmax(-1)
    routes = torch.stack([chosen.ids for chosen in expected.routes])
    runtime = Runtime(pack_model(model, format))
    hidden, ids = serve(runtime, tokens, [333])
    changes = (runtime.logits(hidden).log_softmax(-1) - logprobs).abs()
    equal = (torch.stack(ids)[..., None] == routes[..., None, :]).any(-1)
    hidden, _ = serve(runtime, tokens, [333], routes)
    replayed = (runtime.logits(hidden).log_softmax(-1) - logprobs).abs()
    found = (changes.mean(), 1 - equal.float().mean(), replayed.mean(), replayed.max())
    assert all(float(a) <= 2 * b for a, b in zip(found, DISTANCES[format, dtype], strict=True)), found


def test_an_unknown_format_is_refused(make_config: Make) -> None:
    with pytest.raises(ConfigError, match="fp32, bf16, int8, int4"):
        Runtime(pack_model(make_model(make_config), "int2"))
