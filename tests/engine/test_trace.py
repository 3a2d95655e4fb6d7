"""Tracing a known text: the numbers are the engine's own, and those of the trained model's forward pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from completions import run_all

from moestro.checkpoints.packing import pack_model
from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.runtime import Runtime
from moestro.engine.sequence import Request, SamplingParams
from moestro.engine.trace import TokenTrace, trace
from moestro.errors import ConfigError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer, init_weights
from moestro.ops import library
from moestro.ops.serving import plain

NUM_TOKENS = 100  # more than one page


@pytest.fixture(scope="module")
def model(make_config: Callable[..., Config]) -> Transformer:
    made = Transformer(make_config("model.init_std=0.2", "model.num_layers=3").model).eval()
    init_weights(made, 3)
    generator = torch.Generator().manual_seed(3)
    for _, router in made.routers():
        router.bias.copy_(torch.randn(len(router.bias), generator=generator) * 0.2 - 0.5)
    return made


@pytest.fixture(scope="module")
def runtime(model: Transformer) -> Runtime:
    return Runtime(pack_model(model))


@pytest.fixture(scope="module")
def text(model: Transformer) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(model.config.vocab_size, (NUM_TOKENS,), generator=generator).tolist()


@pytest.fixture(scope="module")
def traces(runtime: Runtime, text: list[int]) -> list[TokenTrace]:
    return [one for chunk in trace(runtime, text, num_top=3) for one in chunk]


def test_experts_and_weights_are_those_of_the_trained_model(
    model: Transformer, text: list[int], traces: list[TokenTrace]
) -> None:
    with torch.no_grad():
        output = model(torch.tensor(text), AttentionBatch.causal(1, len(text)), logits=True)
    assert output.logits is not None
    logprobs = output.logits.log_softmax(-1).numpy()
    for layer, routes in enumerate(output.routes):
        for one, ids, weights in zip(traces, routes.ids.tolist(), routes.weights.tolist(), strict=True):
            expected = dict(zip(ids, weights, strict=True))
            found = dict(zip(one.ids[layer].tolist(), one.weights[layer].tolist(), strict=True))
            assert found.keys() == expected.keys()
            assert [found[id] for id in expected] == pytest.approx([*expected.values()], rel=1e-3)
    assert [one.token for one in traces] == text and traces[0].prediction is None
    for at, one in enumerate(traces[1:], 1):
        row = logprobs[at - 1]
        assert one.prediction is not None
        assert one.prediction.logprob == pytest.approx(row[text[at]], abs=1e-3)
        assert one.prediction.rank == 1 + int((row > row[text[at]]).sum())
        assert one.prediction.entropy == pytest.approx(-(np.exp(row) * row).sum(), abs=1e-3)
        assert [id for id, _ in one.prediction.top] == np.argsort(-row)[:3].tolist()


@pytest.mark.skipif(plain.computes(), reason="without kernels the last bits depend on how a text is cut")
def test_a_trace_repeats_what_was_generated_bit_for_bit(
    runtime: Runtime, tokenizer: Tokenizer, text: list[int]
) -> None:
    engine = Engine(runtime, tokenizer, frozenset([tokenizer.eos_id]), max_running=1)
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=2, logprobs=0, return_routes=True)
    (written,) = run_all(engine, [Request(text[:70], params)])
    found = [one for chunk in trace(runtime, text[:70] + written.ids) for one in chunk]
    assert written.routes is not None
    ids = torch.stack([one.ids for one in found[:-1]])
    assert torch.equal(ids.to(torch.int16), written.routes)  # the last token was not fed back
    own = [one.prediction.logprob for one in found[70:] if one.prediction]
    assert own == [score.logprob for score in written.logprobs]


def test_texts_that_the_model_cannot_read(runtime: Runtime) -> None:
    for tokens in ([], [0] * (runtime.config.max_seq_len + 1), [runtime.config.vocab_size], [-1]):
        with pytest.raises(ConfigError):
            next(trace(runtime, tokens))


def test_a_model_without_experts(make_config: Callable[..., Config]) -> None:
    dense = Transformer(make_config("model.num_dense_layers=2", "model.mtp_depth=0").model).eval()
    init_weights(dense, 0)
    (chunk,) = trace(Runtime(pack_model(dense)), [5, 6, 7])
    assert [one.ids.shape[0] for one in chunk] == [0, 0, 0]
    assert [one.weights.shape for one in chunk] == [one.ids.shape for one in chunk]


def test_it_does_without_kernels(
    model: Transformer, text: list[int], traces: list[TokenTrace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load_library", lambda: None)
    monkeypatch.setattr(library, "WISH", "reference")
    found = [one for chunk in trace(Runtime(pack_model(model)), text, num_top=3) for one in chunk]
    for one, other in zip(found, traces, strict=True):
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-3, atol=1e-4)
