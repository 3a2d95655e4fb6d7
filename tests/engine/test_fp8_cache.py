"""Engines whose latents are cached in FP8: the same bits in any company, more pages, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from completions import assert_same, run_all
from torch import Tensor, nn

from moestro.checkpoints.packing import pack_model
from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.language_model import LanguageModel
from moestro.engine.paged_cache import PagedCache, page_bytes, plan_room
from moestro.engine.runtime import Runtime, Texts
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import ConfigError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer, init_weights
from moestro.ops import library
from moestro.ops.fp8 import dequantize_fp8, quantize_fp8
from moestro.ops.precision import precision_of

Make = Callable[..., Config]


def make_model(make_config: Make, dtype: torch.dtype = torch.float32, *overrides: str) -> Transformer:
    shape = ("model.init_std=0.2", "model.max_seq_len=256", "model.kv_lora_rank=130", *overrides)
    model = Transformer(make_config(*shape).model, precision_of(dtype)).eval()
    init_weights(model, 0)
    return model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def written(request: pytest.FixtureRequest, make_config: Make, tokenizer: Tokenizer) -> LanguageModel:
    return LanguageModel(make_model(make_config, request.param), tokenizer, frozenset(), cache="fp8")


def engine_of(model: LanguageModel, num_pages: int = 64, **limits: int) -> Engine:
    size = page_bytes(model.config, model.model.dtype, "fp8")
    return Engine(model.runtime, model.tokenizer, model.stop_ids, memory_bytes=num_pages * size, **limits)  # type: ignore[arg-type]


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests_of(max_tokens: int = 12) -> list[Request]:
    """Greedy and sampled; some begin alike. One draft a step is the default of a model with a module."""
    params = SamplingParams(max_tokens=max_tokens, logprobs=2, top_p=0.95, return_routes=True)
    return [
        Request(
            random_ids(70, 99) * (i % 3 == 1) + random_ids(n, i), replace(params, temperature=0.9 * (i % 2), seed=i)
        )
        for i, n in enumerate((60, 50, 62, 1, 110, 70))
    ]


def test_company_chunks_and_preemption_change_no_bit(written: LanguageModel) -> None:
    requests = requests_of()
    assert written.runtime.cache == "fp8"
    alone = [run_all(engine_of(written), [request])[0] for request in requests]
    assert engine_of(written).cache.layers[0]["latent"].dtype == torch.uint8
    crowded = engine_of(written, num_pages=4, token_budget=61, max_running=8)
    for engine in (engine_of(written, token_budget=61, max_running=8), crowded):
        for one, other in zip(alone, run_all(engine, requests), strict=True):
            assert_same(one, other)
        pool = engine.scheduler.pool
        assert pool.num_available == pool.num_pages
    assert crowded.scheduler.num_preemptions


def test_a_prefix_that_others_left_changes_no_bit(written: LanguageModel) -> None:
    engine, beginning = engine_of(written), random_ids(150, 5)
    params = SamplingParams(max_tokens=9, logprobs=1, return_routes=True)
    run_all(engine, [Request(beginning, params)])
    follow_up = Request([*beginning, 7, 8], params)
    again = run_all(engine, [follow_up])[0]
    assert engine.stats().prefix_hit_tokens == 128
    assert_same(again, run_all(engine_of(written), [follow_up])[0])


def test_without_native_kernels(written: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_library", lambda: None)
    monkeypatch.setattr(library, "WISH", "reference")
    plain = LanguageModel(written.model, written.tokenizer, frozenset(), cache="fp8")
    requests = requests_of(3)[:3]
    alone = [run_all(engine_of(plain), [request])[0] for request in requests]
    for one, other in zip(alone, run_all(engine_of(plain, token_budget=61, max_running=4), requests), strict=True):
        assert_same(one, other)


class Rounded(nn.Module):
    """A norm of latents whose results have been codes."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return dequantize_fp8(*quantize_fp8(self.norm(x), (1, 128), least=1e-4))


def test_scores_are_those_of_a_model_with_rounded_latents(make_config: Make) -> None:
    """Of the trained model in plain torch; what remains is that rotated keys are bf16."""
    model, tokens = make_model(make_config), torch.tensor(random_ids(150, 1))
    texts = Texts(tokens, [0, 150], F.pad(tokens[1:], (0, 1), value=-100))
    packed = pack_model(model)
    plain, coded = (next(Runtime(packed, cache).score([texts])).nll for cache in ("auto", "fp8"))
    layers: Any = model.layers
    for block in layers:
        block.attention.kv_norm = Rounded(block.attention.kv_norm)
    with torch.no_grad():
        logits = model(tokens, AttentionBatch.causal(1, 150), logits=True).logits
    expected = F.cross_entropy(logits, texts.targets, reduction="none", ignore_index=-100)
    assert (coded - expected).norm() < 0.2 * (plain - expected).norm()


def test_pages_are_counted_in_bytes_of_codes(make_config: Make) -> None:
    config = make_config("model.kv_lora_rank=512", "model.rope_dim=64", "model.max_seq_len=256").model
    size, routes = page_bytes(config, torch.bfloat16, "fp8"), 64 * 2 * 2
    assert size == 64 * 3 * 656 + routes and page_bytes(config, torch.bfloat16) == 64 * 3 * 1152 + routes
    cache = PagedCache(config, 2, torch.float32, "fp8")
    assert sum(t.nbytes for layer in cache.layers for t in layer.values()) + cache.routes.nbytes == 2 * size
    assert [plan_room(config, torch.bfloat16, 9, 2**21, c).num_pages for c in ("auto", "fp8")] == [9, 16]


def test_what_has_no_latents_is_refused(make_config: Make, tokenizer: Tokenizer) -> None:
    heads = make_model(make_config, torch.float32, "model.attention=gqa", "model.num_heads=4", "model.num_kv_heads=2")
    for make in (
        lambda: LanguageModel(heads, tokenizer, frozenset(), cache="fp8"),
        lambda: Runtime(pack_model(heads), "fp8"),
        lambda: Engine(Runtime(pack_model(heads)), tokenizer, frozenset(), cache="fp8"),
    ):
        with pytest.raises(ConfigError, match="only latents are cached in fp8, and this model's attention is gqa"):
            make()
    with pytest.raises(ConfigError, match="auto or fp8, not 'int8'"):
        LanguageModel(heads, tokenizer, frozenset(), cache="int8")
