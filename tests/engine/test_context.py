"""How long a sequence may be, and what the cache takes for it: given, or as much as fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moestro import machine
from moestro.config import Config, build_config, load_preset
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.language_model import LanguageModel
from moestro.engine.paged_cache import Room, free_bytes, page_bytes, plan_room
from moestro.engine.pages import PagePool
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import ConfigError
from moestro.model.transformer import Transformer, init_weights

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def model(make_config: Make) -> Transformer:
    model = Transformer(make_config("model.init_std=0.2", "model.max_seq_len=4096").model)
    init_weights(model, 0)
    return model.eval()


def open_model(model: Transformer, tokenizer: Tokenizer, **settings: Any) -> LanguageModel:
    return LanguageModel(model, tokenizer, frozenset([tokenizer.eos_id]), **settings)


def test_a_context_is_what_is_asked_for_or_what_fits() -> None:
    """V3 keeps 1,152 bytes a token and layer in bf16 (V3 §2.1.1), of 61 layers and one MTP module."""
    config = build_config(load_preset("deepseek-v3")).model
    page = page_bytes(config, torch.bfloat16)
    assert page == 64 * (62 * 1152 + 58 * 8 * 2)
    assert plan_room(config, torch.bfloat16, 4, 10 * page) == Room(10, 640)
    assert plan_room(config, torch.bfloat16, 4, 10 * page, max_context=500) == Room(10, 500)
    assert plan_room(config, torch.bfloat16, 1, 10 * page, max_context=500) == Room(8, 500)
    assert plan_room(config, torch.bfloat16, 1, 2**50) == Room(2560, 163840)
    with pytest.raises(ConfigError, match=r"one sequence of 1,000 tokens, and has \d"):
        plan_room(config, torch.bfloat16, 4, 10 * page, max_context=1000)
    with pytest.raises(ConfigError, match="of 256 tokens"):
        plan_room(config, torch.bfloat16, 4, 3 * page)


@pytest.mark.parametrize("context", [0, -1, 4097])
def test_a_context_beyond_the_models_own_is_refused(model: Transformer, tokenizer: Tokenizer, context: int) -> None:
    with pytest.raises(ConfigError, match="between 1 and the model's own 4096"):
        open_model(model, tokenizer, max_context=context)


def test_a_request_beyond_the_context_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    limited = open_model(model, tokenizer, max_context=100)
    assert limited.context == 100
    with pytest.raises(ConfigError, match=r"90 tokens\) and max_tokens \(20\) exceed the context of 100 .* takes 4096"):
        limited.generate([5] * 90, max_tokens=20)
    assert len(limited.generate([5] * 90, max_tokens=10).ids) <= 10


def test_a_text_takes_the_memory_that_it_can_need(model: Transformer, tokenizer: Tokenizer) -> None:
    """And another engine, with room for everything from the start, writes the same."""
    growing = open_model(model, tokenizer)
    whole = Engine(growing.runtime, tokenizer, growing.stop_ids, memory_bytes=2**26)
    for length, pages in ((70, 2), (20, 2), (200, 4), (300, 6)):
        request = Request([7 + length % 50] * length, SamplingParams(max_tokens=50))
        (expected,) = whole.run([request])
        assert growing.generate(request.prompt, max_tokens=50).ids == expected[0].ids
        pool = growing.engine.scheduler.pool
        assert pool.num_pages == len(growing.engine.cache.routes) == pages
        assert {len(t) for layer in growing.engine.cache.layers for t in layer.values()} == {pages}


def test_a_growing_cache_keeps_what_it_holds(model: Transformer, tokenizer: Tokenizer) -> None:
    """Streams read in turn: a later one makes room for itself, and a text that was cached is found again."""
    growing, prompt = open_model(model, tokenizer), [9] * 130
    alone = growing.generate(prompt, max_tokens=40).ids
    first, second = growing.stream_ids(prompt, max_tokens=40), growing.stream_ids([3] * 500, max_tokens=9)
    taken = [next(first)]
    list(second)
    assert taken + list(first) == alone
    assert growing.engine.stats().prefix_hit_tokens == 128


def test_pages_added_to_a_pool_are_free_and_their_own() -> None:
    pool = PagePool(2)
    held = pool.allocate(2)
    pool.grow(5)
    assert (pool.num_pages, pool.num_available) == (5, 3)
    assert sorted([*held, *pool.allocate(3)]) == [0, 1, 2, 3, 4]


def test_free_memory_leaves_room_for_mapped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (64 * 2**30, 40 * 2**30))
    assert free_bytes() == 20 * 2**30
    assert free_bytes(mapped=30 * 2**30) == 5 * 2**30
    assert free_bytes(mapped=400 * 2**30) == 40 * 2**30 / 16  # weights larger than memory: some room still


def test_the_budget_of_a_step_follows_the_number_of_sequences(model: Transformer, tokenizer: Tokenizer) -> None:
    runtime = open_model(model, tokenizer).runtime
    for running, drafts, budget in ((64, 1, 512), (600, 0, 1200), (600, 1, 2400)):
        engine = Engine(runtime, tokenizer, frozenset(), memory_bytes=2**26, max_running=running, draft_tokens=drafts)
        assert engine.scheduler.token_budget == budget
