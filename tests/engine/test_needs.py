"""What serving is said to need, against what a model and its cache then hold, and against published numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moestro.checkpoints.packing import pack_model, packed_bytes
from moestro.config import Config, build_config, load_preset
from moestro.engine.needs import ServingNeeds, active_bytes, serving_needs, working_bytes
from moestro.engine.paged_cache import PagedCache
from moestro.engine.runtime import Runtime
from moestro.model.size import measure_size
from moestro.model.transformer import Transformer, init_weights
from moestro.ops import library
from moestro.ops.serving.formats import FORMATS

Make = Callable[..., Config]
SHAPE = ("model.hidden_dim=128", "model.expert_dim=96", "model.vocab_size=900", "model.num_layers=4")


@pytest.mark.parametrize("format", FORMATS)
def test_weights_and_cache_are_those_that_are_allocated(make_config: Make, format: str) -> None:
    model = Transformer(make_config(*SHAPE).model)
    init_weights(model, 0)
    needs = serving_needs(model, format, 100)
    runtime = Runtime(pack_model(model, format))
    assert needs.weights == sum(tensor.nbytes for tensor in runtime.tensors.values())
    cache = PagedCache(model.config, 2, runtime.dtype)
    held = [pages.nbytes for layer in cache.layers for pages in layer.values()]
    assert needs.cache == sum(held) + cache.routes.nbytes


@pytest.mark.skipif(not library.is_available(), reason="a tape, which says its memory, needs the native kernels")
@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_working_memory_is_about_that_of_a_step(make_config: Make, attention: str) -> None:
    model = Transformer(make_config(*SHAPE, f"model.attention={attention}").model)
    init_weights(model, 0)
    tape = Runtime(pack_model(model))._main.tape
    assert tape is not None
    values = working_bytes(model.config, torch.float32, rows=1) - 64 * model.config.vocab_size * 4
    assert values == pytest.approx(tape._row_bytes, rel=0.4)


def test_active_bytes_are_those_of_active_parameters() -> None:
    """V3: 37B of 671B parameters are active; in bf16 that is 2 bytes each, less the embedding, of which a row is read.

    Packed, kv_up is there once, as `absorb` and `expand`; routers are fp32.
    """
    config = build_config(load_preset("deepseek-v3")).model
    found = active_bytes(config, packed_bytes(config, "bf16"))
    assert found == pytest.approx(2 * measure_size(config).active_without_embedding, rel=0.01)
    assert found == pytest.approx(2 * 37e9, rel=0.02)


def test_the_bound_is_bytes_over_speed_and_counts_the_context() -> None:
    config = build_config(load_preset("deepseek-v2-lite")).model
    short, long = (serving_needs(config, "int4", context) for context in (64, 64_000))
    assert long.read - short.read == (64_000 - 64) * 27 * 576 * 2  # V2-Lite: 27 layers, 512 + 64 values, bf16
    assert short.most_tokens_per_second(short.read * 7.0) == 7.0


def test_mapped_weights_may_exceed_memory() -> None:
    own, mapped = (ServingNeeds("int8", 100, 10, 5, 50, private) for private in (True, False))
    assert not own.fits(100) and own.fits(115)
    assert mapped.fits(15) and not mapped.fits(14)
