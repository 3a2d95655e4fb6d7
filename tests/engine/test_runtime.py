"""The served model beside its forward pass: routes that are given, weights that are updated in place, texts scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.checkpoints.packing import pack_model
from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine import runtime as runtime_module
from moestro.engine.engine import Engine
from moestro.engine.language_model import LanguageModel, load, pack
from moestro.engine.paged_cache import PagedCache
from moestro.engine.runtime import Runtime, StepOutput, Texts
from moestro.engine.scheduler import pages_for
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import ConfigError, MoestroError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer, init_weights
from moestro.ops import library
from moestro.ops.precision import precision_of
from moestro.ops.serving.formats import FORMATS
from moestro.training.checkpoint import write_model_directory

Make = Callable[..., Config]
HASH = [
    "model.router.selection=hash",
    "model.router.score=constant",
    "model.router.bias=none",
    "model.router.balance=[]",
]
SCHEMES = {
    "groups": ["model.q_lora_rank=12", "model.num_groups=4", "model.top_k_groups=2"],
    "one hashed layer": ["model.router.score=sqrt_softplus", "model.router.num_hash_layers=1", "model.num_layers=3"],
    "hash": HASH,
}


def make_model(make_config: Make, *overrides: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(make_config("model.init_std=0.2", *overrides).model, precision_of(dtype)).eval()
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    for _, router in model.routers():
        if model.config.router.bias != "none":
            router.bias.copy_(torch.randn(len(router.bias), generator=generator) * 0.2 - 0.5)
    return model


def random_tokens(count: int, seed: int = 3) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def serve(runtime: Runtime, tokens: list[int], ids: Tensor | None = None) -> StepOutput:
    """One sequence from its beginning."""
    pages = list(range(pages_for(len(tokens))))
    cache = PagedCache(runtime.config, len(pages), runtime.dtype)
    return runtime.forward(cache.prepare([(tokens, 0, pages)]), cache, ids)


@pytest.fixture(params=["tape", "reference", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pass as one native call, or operation by operation: in a fixed order, or with the library's products."""
    if request.param != "tape":
        monkeypatch.setattr(library, "load_library", lambda: None)
        monkeypatch.setattr(library, "WISH", "reference" if request.param == "reference" else "")
    elif not library.is_available():
        pytest.skip("a tape needs the native kernels")
    return str(request.param)


@pytest.mark.parametrize("overrides", SCHEMES.values(), ids=SCHEMES)
def test_given_routes_are_used_with_the_weights_of_the_routers_own_scores(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, way: str, overrides: list[str]
) -> None:
    """As the trained model computes whose routers are told what to choose."""
    model, tokens = make_model(make_config, *overrides), random_tokens(80)
    runtime = Runtime(pack_model(model))
    assert (runtime._main.tape is not None) == (way == "tape")
    plain = serve(runtime, tokens)
    same = serve(runtime, tokens, plain.ids)
    assert torch.equal(same.hidden, plain.hidden) and torch.equal(same.ids, plain.ids)
    generator = torch.Generator().manual_seed(5)
    given = torch.stack([torch.rand(80, 8, generator=generator).topk(2).indices for _ in plain.ids])
    before = given.clone()
    replayed = serve(runtime, tokens, given)
    assert torch.equal(replayed.ids, given) and torch.equal(given, before)
    for (_, router), ids in zip(model.routers(), given, strict=False):
        monkeypatch.setattr(router, "choose", lambda scores, tokens, ids=ids: ids)
    with torch.inference_mode():
        expected = model(torch.tensor(tokens), AttentionBatch.causal(1, 80)).hidden
    torch.testing.assert_close(replayed.hidden, expected, rtol=1e-4, atol=1e-4)
    assert float((replayed.hidden - plain.hidden).abs().max()) > 0.1


@pytest.mark.parametrize("overrides", SCHEMES.values(), ids=SCHEMES)
def test_routes_may_be_given_for_some_tokens(make_config: Make, way: str, overrides: list[str]) -> None:
    """The others are chosen, from what the given ones made of their context."""
    runtime, tokens = Runtime(pack_model(make_model(make_config, *overrides))), random_tokens(70)
    plain = serve(runtime, tokens)
    given = (plain.ids + 3) % 8
    given[:, 40:] = -1
    mixed = serve(runtime, tokens, given)
    assert torch.equal(mixed.ids[:, :40], given[:, :40])
    whole = serve(runtime, tokens, mixed.ids)
    assert torch.equal(whole.hidden, mixed.hidden) and torch.equal(whole.ids, mixed.ids)
    given[:, :40] = -1
    assert torch.equal(serve(runtime, tokens, given).hidden, plain.hidden)


def test_tape_and_operations_replay_alike(make_config: Make) -> None:
    if not library.is_available():
        pytest.skip("needs the native kernels")
    model, tokens = make_model(make_config, dtype=torch.bfloat16), random_tokens(70)
    runtime = Runtime(pack_model(model, "int8"))
    given = (serve(runtime, tokens).ids + 1) % 8
    eager = Runtime(pack_model(model, "int8"))
    eager._main.tape = None
    assert torch.equal(serve(runtime, tokens, given).hidden, serve(eager, tokens, given).hidden)


def test_routes_that_do_not_fit_are_refused(make_config: Make) -> None:
    runtime, tokens = Runtime(pack_model(make_model(make_config))), random_tokens(5)
    good = serve(runtime, tokens).ids
    for change, named in (
        (lambda ids: ids[:, :4], r"\[1, 4, 2\].* are \[1, 5, 2\]"),
        (lambda ids: ids.float(), "float32"),
        (lambda ids: ids + 8, "between 0 and 7"),
        (lambda ids: ids - 9, "between 0 and 7"),
        (lambda ids: torch.cat([ids[..., :1], ids[..., 1:] * 0 - 1], -1), "-1 for all of a token"),
    ):
        with pytest.raises(ValueError, match=named):
            serve(runtime, tokens, change(good))


def addresses(runtime: Runtime) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in runtime.tensors.items() if not name.endswith(".sizes")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_updated_model_is_the_new_model(make_config: Make, way: str, format: str, dtype: torch.dtype) -> None:
    """Bit for bit, in the memory of the old one; MTP modules too."""
    first, second = (make_model(make_config, *SCHEMES["groups"], seed=seed, dtype=dtype) for seed in (0, 10))
    tokens = random_tokens(70)
    runtime, fresh = Runtime(pack_model(first, format)), Runtime(pack_model(second, format))
    before, places = runtime.logits(serve(runtime, tokens).hidden), addresses(runtime)
    runtime.update(second)
    assert way == "plain" or addresses(runtime) == places  # plain: the panels are made for the question
    assert all(torch.equal(tensor, fresh.tensors[name]) for name, tensor in runtime.tensors.items())
    one, other = serve(runtime, tokens), serve(fresh, tokens)
    assert torch.equal(one.hidden, other.hidden) and torch.equal(one.ids, other.ids)
    assert torch.equal(runtime.logits(one.hidden), fresh.logits(other.hidden))
    runtime.update(first)
    assert torch.equal(runtime.logits(serve(runtime, tokens).hidden), before)


@pytest.mark.parametrize(
    "overrides", [HASH, ["model.tie_embeddings=true"], ["model.attention=mqa", "model.num_heads=4"]],
    ids=["hash", "tied", "mqa"],
)  # fmt: skip
def test_every_scheme_is_updated(make_config: Make, overrides: list[str]) -> None:
    first, second = (make_model(make_config, *overrides, seed=seed) for seed in (0, 10))
    runtime, fresh, tokens = Runtime(pack_model(first)), Runtime(pack_model(second)), random_tokens(70)
    runtime.update(second)
    assert torch.equal(serve(runtime, tokens).hidden, serve(fresh, tokens).hidden)


def answer(engine: Engine, prompt: list[int]) -> Any:
    params = SamplingParams(max_tokens=8, logprobs=2, return_routes=True)
    ((completion,),) = engine.run([Request(prompt, params)])
    assert completion.routes is not None
    return completion.ids, completion.logprobs, completion.routes.tolist(), completion.drafts


def engine_of(held: LanguageModel) -> Engine:
    return Engine(held.runtime, held.tokenizer, held.stop_ids, memory_bytes=1 << 20)


@pytest.mark.parametrize("format", FORMATS)
def test_an_updated_engine_forgets_the_prefixes_of_the_old_weights(make_config: Make, format: str) -> None:
    models = [make_model(make_config, seed=seed) for seed in (0, 10)]
    held = [LanguageModel(model, SimpleNamespace(), frozenset(), weights=format) for model in models]  # type: ignore[arg-type]
    engine, fresh = (engine_of(one) for one in held)
    prompt = random_tokens(100)
    old = answer(engine, prompt)
    assert answer(engine, prompt) == old and engine.stats().prefix_hit_tokens == 64
    engine.update(models[1])
    new = answer(engine, prompt)
    assert engine.stats().prefix_hit_tokens == 64
    assert new == answer(fresh, prompt) and new != old
    assert answer(engine, prompt) == new and engine.stats().prefix_hit_tokens == 128  # and remembers the new ones
    pool = engine.scheduler.pool
    assert pool.num_available == pool.num_pages


def test_another_engine_of_the_same_model_forgets_too(make_config: Make) -> None:
    models = [make_model(make_config, seed=seed) for seed in (0, 10)]
    held = LanguageModel(models[0], SimpleNamespace(), frozenset())  # type: ignore[arg-type]
    engine, other = (engine_of(held) for _ in range(2))
    prompt = random_tokens(100)
    answer(engine, prompt)
    answer(other, prompt)
    other.update(models[1])
    assert answer(engine, prompt) == answer(other, prompt)
    engine.add(Request(prompt, SamplingParams(max_tokens=8)))
    engine.step()
    other.update(models[0])
    with pytest.raises(MoestroError, match="updated while requests were running"):
        engine.step()


def test_what_cannot_be_updated_is_refused(make_config: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, larger = make_model(make_config), make_model(make_config, "model.expert_dim=24", "model.router.scale=2")
    held = LanguageModel(model, SimpleNamespace(), frozenset())  # type: ignore[arg-type]
    engine = engine_of(held)
    before = {name: tensor.clone() for name, tensor in engine.runtime.tensors.items()}
    with pytest.raises(ConfigError, match="another model: expert_dim, router differ"):
        engine.update(larger)
    request = engine.add(Request([1, 2], SamplingParams(max_tokens=8)))
    with pytest.raises(ConfigError, match="while requests run"):
        engine.update(make_model(make_config, seed=9))
    engine.abort(request)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.runtime.tensors.items())
    write_model_directory(tmp_path / "model", model, tokenizer)
    pack(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(ConfigError, match="packed is mapped and only read"):
        load(tmp_path / "packed").runtime.update(model)


def texts_of(lengths: list[int], seed: int) -> Texts:
    """Texts of which every fifth token has no target, nor has the last one of each."""
    tokens = torch.tensor(random_tokens(sum(lengths), seed))
    starts = [0, *itertools.accumulate(lengths)]
    targets = torch.cat([F.pad(part[1:], (0, 1), value=-100) for part in tokens.split(lengths)])
    targets[::5] = -100
    return Texts(tokens, starts, targets)


def test_scores_are_those_of_the_trained_model(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text by text, in company and over pages that others have used; one cache serves batches of one size."""
    made: list[int] = []

    class Counted(PagedCache):
        def __init__(self, config: Any, num_pages: int, dtype: torch.dtype, cache: str) -> None:
            made.append(num_pages)
            super().__init__(config, num_pages, dtype, cache)

    monkeypatch.setattr(runtime_module, "PagedCache", Counted)
    monkeypatch.setattr(runtime_module, "SCORED_ROWS", 7)
    model = make_model(make_config)
    runtime = Runtime(pack_model(model))
    batches = [texts_of(lengths, seed) for seed, lengths in enumerate(([70, 3, 1], [64, 9], [1, 1, 5]))]
    found = list(runtime.score(batches))
    assert made == [4]
    for texts, scores in zip(batches, found, strict=True):
        for first, last in itertools.pairwise(texts.starts):
            own, targets = slice(first, last), texts.targets[first:last]
            with torch.inference_mode():
                output = model(texts.tokens[own], AttentionBatch.causal(1, last - first), logits=True)
                logits = output.logits
            expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
            torch.testing.assert_close(scores.nll[own], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(scores.argmax[own], torch.where(targets >= 0, logits.argmax(-1), -1))
            for ids, routes in zip(scores.ids[:, own], output.routes, strict=True):
                assert torch.equal(ids.sort(-1).values, routes.ids.sort(-1).values)


def test_scores_with_given_routes(make_config: Make) -> None:
    runtime, texts = Runtime(pack_model(make_model(make_config))), texts_of([70, 9], 0)
    (plain,) = runtime.score([texts])
    given = (plain.ids + 1) % 8
    (replayed,) = runtime.score([Texts(texts.tokens, texts.starts, texts.targets, given)])
    assert torch.equal(replayed.ids, given) and not torch.equal(replayed.nll, plain.nll)
