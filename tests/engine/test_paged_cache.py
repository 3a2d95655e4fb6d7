"""The tensors of the cache: what each layer states, with a name, a width and a type of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moestro.config import Config
from moestro.engine import paged_cache
from moestro.engine.paged_cache import PagedCache, page_bytes
from moestro.model.attention import CacheSpec, cache_width, list_caches

Make = Callable[..., Config]
DIFFERENT = [
    (CacheSpec("latent", 24), CacheSpec("index_key", 8, torch.float32)),
    (CacheSpec("latent", 40),),
    (CacheSpec("latent", 24, torch.uint8),),
]


def measure_page(cache: PagedCache, num_pages: int) -> int:
    tensors = [pages for layer in cache.layers for pages in layer.values()]
    return sum(tensor.nbytes for tensor in [*tensors, cache.routes]) // num_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("attention", "name"), [("mla", "latent"), ("gqa", "kv")])
def test_a_cache_for_every_layer_and_module(make_config: Make, attention: str, name: str, dtype: torch.dtype) -> None:
    config = make_config(f"model.attention={attention}", "model.mtp_depth=2").model
    cache = PagedCache(config, 3, dtype)
    assert len(cache.layers) == config.num_layers + 2
    for layer in cache.layers:
        ((found, pages),) = layer.items()
        assert (found, pages.shape, pages.dtype) == (name, (3, 64, cache_width(config)), dtype)
    assert page_bytes(config, dtype) == measure_page(cache, 3)


def test_layers_may_differ_in_what_they_cache(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config().model
    assert len(list_caches(config)) == config.num_layers + config.mtp_depth
    monkeypatch.setattr(paged_cache, "list_caches", lambda *_: DIFFERENT)
    cache = PagedCache(config, 2, torch.bfloat16)
    found = [{name: (pages.shape[2], pages.dtype) for name, pages in layer.items()} for layer in cache.layers]
    assert found == [
        {"latent": (24, torch.bfloat16), "index_key": (8, torch.float32)},
        {"latent": (40, torch.bfloat16)},
        {"latent": (24, torch.uint8)},
    ]
    routes = cache.routes.nbytes // 2
    assert page_bytes(config, torch.bfloat16) == measure_page(cache, 2) == 64 * (2 * 24 + 4 * 8 + 2 * 40 + 24) + routes
