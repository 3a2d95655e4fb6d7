"""Absorbed, naive and packed attention are one function; every kind of attention decodes what it prefills."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moestro.config import Config, build_config, load_preset
from moestro.engine.latent_cache import GrowingLayer, new_cache
from moestro.model import attention as attention_module
from moestro.model.attention import AttentionBatch, LatentAttention, absorbed_is_cheaper, attend, cache_width
from moestro.model.rope import rope_tables
from moestro.model.transformer import Transformer, init_weights

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def latent(make_config: Make) -> LatentAttention:
    layer = LatentAttention(make_config("model.q_lora_rank=12", "model.max_seq_len=600").model)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return layer


@pytest.mark.parametrize("cached", [1, 63, 64, 65, 500])
@pytest.mark.parametrize("new", [1, 2, 5])
@torch.no_grad()
def test_three_ways_agree(latent: LatentAttention, monkeypatch: pytest.MonkeyPatch, cached: int, new: int) -> None:
    config, total = latent.config, cached + new
    x = torch.randn(total, config.hidden_dim, generator=torch.Generator().manual_seed(cached))
    rope = rope_tables(config, torch.arange(total))
    packed = latent(x, rope, AttentionBatch.causal(1, total))
    for absorbed in (False, True):
        monkeypatch.setattr(attention_module, "absorbed_is_cheaper", lambda *_, answer=absorbed: answer)
        cache = GrowingLayer(cache_width(config), torch.float32)
        first = latent(x[:cached], tuple(t[:cached] for t in rope), AttentionBatch.causal(1, cached), cache)
        last = latent(x[cached:], tuple(t[cached:] for t in rope), AttentionBatch.causal(1, new, cached), cache)
        torch.testing.assert_close(torch.cat([first, last]), packed, rtol=1e-4, atol=2e-5)


def test_attend_equals_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 4, generator=generator) for n in (3, 5, 5))
    out = attend(q, k, v, 0.5)
    for row in range(3):
        for head in range(2):
            seen = range(row + 3)  # the last 3 of 5
            weights = torch.tensor([float(q[row, head] @ k[j, head]) * 0.5 for j in seen]).softmax(0)
            expected = sum(weights[j] * v[j, head] for j in seen)
            torch.testing.assert_close(out[row, head], expected)


def test_the_cheaper_form_is_taken() -> None:
    config = build_config(load_preset("deepseek-v3")).model
    assert absorbed_is_cheaper(config, 1, 4096)
    assert absorbed_is_cheaper(config, 3, 4096)
    assert not absorbed_is_cheaper(config, 4096, 4096)


def test_packed_positions_start_again_with_each_document_and_row() -> None:
    batch = AttentionBatch.packed(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 0, 0, 1, 2]
    assert batch.starts == (0, 2, 5, 6, 7, 10)


@pytest.mark.parametrize("overrides", [["mla"], ["mha"], ["gqa", "model.num_kv_heads=2"], ["mqa"]])
@torch.no_grad()
def test_decoding_equals_computing_anew(make_config: Make, overrides: list[str]) -> None:
    kind, *rest = overrides
    config = make_config(f"model.attention={kind}", "model.num_heads=4", "model.init_std=0.2", *rest).model
    model = Transformer(config).eval()
    init_weights(model, 0)
    tokens = torch.randint(0, 300, (80,), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, AttentionBatch.causal(1, 80)).hidden
    cache, parts, position = new_cache(config, torch.float32), [], 0
    for part in tokens.split([60, 1, 1, 4, 14]):
        parts.append(model(part, AttentionBatch.causal(1, len(part), position), cache).hidden)
        position += len(part)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=5e-5)
    assert {tuple(layer.rows.shape)[1] for layer in cache} == {cache_width(config)}


@pytest.mark.parametrize(
    ("overrides", "width"),
    [
        (["mla"], 16 + 4),
        (["mha"], 4 * (12 + 8)),
        (["gqa", "model.num_kv_heads=2"], 2 * (12 + 8)),
        (["mqa"], 12 + 8),
    ],
)
def test_cache_width_is_what_the_papers_count(make_config: Make, overrides: list[str], width: int) -> None:
    kind, *rest = overrides
    assert cache_width(make_config(f"model.attention={kind}", "model.num_heads=4", *rest).model) == width
