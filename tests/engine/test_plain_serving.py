"""Models served with the library's products, without kernels: the same numbers within rounding, in any company."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moestro.checkpoints.packing import pack_model
from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.paged_cache import PagedCache
from moestro.engine.runtime import Runtime
from moestro.engine.scheduler import pages_for
from moestro.engine.sequence import Request, SamplingParams
from moestro.model.attention import AttentionBatch
from moestro.model.parts import saved_tensors
from moestro.model.transformer import Transformer, init_weights
from moestro.ops import library
from moestro.ops.serving import plain
from moestro.ops.serving.formats import FORMATS
from moestro.ops.serving.program import Heads

Make = Callable[..., Config]
KINDS = {
    "mla": ("model.q_lora_rank=20",),
    "gqa": ("model.attention=gqa", "model.num_heads=4", "model.num_kv_heads=2"),
    "groups": ("model.num_groups=4", "model.top_k_groups=2"),
    "hash": ("model.router.selection=hash",),
    "dense": ("model.num_experts=0",),
    "softmax": ("model.router.score=softmax", "model.router.normalize=false"),
}
LENGTHS = (150, 1, 64, 65)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "load_library", lambda: None)
    monkeypatch.setattr(library, "WISH", "")
    plain.product_dtype.cache_clear()
    yield
    plain.product_dtype.cache_clear()


def make_model(make_config: Make, *overrides: str, dtype: torch.dtype = torch.float32) -> Transformer:
    config = make_config("model.init_std=0.2", "model.max_seq_len=256", *overrides).model
    model = Transformer(config, "fp32" if dtype == torch.float32 else "bf16")
    init_weights(model, 1)
    return model.to(dtype).eval()


@torch.inference_mode()
def serve(runtime: Runtime, texts: list[list[int]], chunk: int = 999) -> list[Tensor]:
    """Hidden states of several texts, computed together, at most `chunk` tokens of each a step."""
    pages, used = [], 0
    for text in texts:
        pages.append(list(range(used, used := used + pages_for(len(text)))))
    cache = PagedCache(runtime.config, used, runtime.dtype, runtime.cache)
    found: list[list[Tensor]] = [[] for _ in texts]
    for first in range(0, max(map(len, texts)), chunk):
        parts = [(t[first : first + chunk], first, p) for t, p in zip(texts, pages, strict=True) if len(t) > first]
        output = runtime.forward(cache.prepare(parts), cache).hidden.split([len(ids) for ids, _, _ in parts])
        for hidden, place in zip(output, [i for i, t in enumerate(texts) if len(t) > first], strict=True):
            found[place].append(hidden)
    return [torch.cat(parts) for parts in found]


def some_texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 300, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("chunk", [999, 50, 1])
def test_served_numbers_are_those_of_the_trained_model(
    make_config: Make, without_kernels: None, overrides: tuple[str, ...], chunk: int
) -> None:
    model = make_model(make_config, *overrides)
    runtime, texts = Runtime(pack_model(model)), some_texts()
    assert runtime.is_plain and runtime._main.tape is None
    for text, hidden in zip(texts, serve(runtime, texts, chunk), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor(text), AttentionBatch.causal(1, len(text))).hidden
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["enough", "little"])
def test_every_format_means_the_same_numbers_open_or_packed(
    make_config: Make,
    without_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    dtype: torch.dtype,
    memory: str,
) -> None:
    """Against a model whose weights are the numbers that the format keeps."""
    if memory == "little":
        monkeypatch.setattr("moestro.machine.usable_bytes", lambda: 0)
    model = make_model(make_config, dtype=dtype)
    packed = pack_model(model, format)
    kept = {name: part for name, part in packed.parts.items() if isinstance(part, plain.Packed)}
    runtime = Runtime(packed)
    if memory == "enough" or FORMATS[format].quantised:
        assert {part.values is not None for part in kept.values()} == {memory == "enough"}
    monkeypatch.setattr(library, "WISH", "reference")
    exact, texts = Runtime(pack_model(model, format)), some_texts()[2:]
    most = 0.03 if dtype == torch.bfloat16 else 1e-4
    rows_differ = format in ("int8", "int4")  # the reference quantises rows as well
    expected = serve(exact, texts)
    monkeypatch.setattr(library, "WISH", "")
    for hidden, wanted in zip(serve(runtime, texts), expected, strict=True):
        by_row = (hidden - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
        error = float(by_row.median())  # rounding may choose another expert for a few
        assert error < (0.2 if rows_differ else most), error
        assert hidden.dtype == wanted.dtype


def test_rows_that_were_never_written_are_not_read(make_config: Make, without_kernels: None) -> None:
    """Pages are unwritten memory, in which anything may stand."""
    q, rows = torch.ones(2, 4, 8), torch.full((2, 64, 8), torch.nan)
    rows[0, :3], rows[1, :1] = 1.0, 2.0
    mixed = plain.attend_once(q, rows, torch.tensor([3, 1]), Heads(1, 0, 6, 0.5))
    assert torch.equal(mixed, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 4, 6))


def test_opened_weights_give_back_their_panels_and_take_others(make_config: Make, without_kernels: None) -> None:
    """What is saved stays what was packed, and an update is a new model, in the same places."""
    for format in ("fp32", "int4"):
        first, second = make_model(make_config), make_model(make_config)
        init_weights(second, 9)
        runtime = Runtime(pack_model(first, format))
        for model in (first, second):
            runtime.update(model)
            fresh = {
                n: t
                for name, part in pack_model(model, format).parts.items()
                for n, t in saved_tensors(name, part).items()
            }
            assert runtime.tensors.keys() == fresh.keys()
            assert all(torch.equal(tensor, fresh[name]) for name, tensor in runtime.tensors.items())
            (hidden,), (wanted,) = (serve(r, [[1, 2, 3]]) for r in (runtime, Runtime(pack_model(model, format))))
            assert torch.equal(hidden, wanted)


def test_an_fp8_cache_and_rounded_rows_are_honoured(make_config: Make, without_kernels: None) -> None:
    model, texts = make_model(make_config, "model.kv_lora_rank=130"), some_texts()[:1]
    usual, cached, rounded = (
        serve(Runtime(pack_model(model, "fp8"), cache, activations), texts)[0]
        for cache, activations in (("auto", "auto"), ("fp8", "auto"), ("auto", "fp8"))
    )
    for other in (cached, rounded):
        error = float((usual - other).norm() / usual.norm())
        assert 1e-4 < error < 0.3


def test_choices_that_are_not_carried_out_add_nothing(make_config: Make, without_kernels: None) -> None:
    runtime = Runtime(pack_model(make_model(make_config)))
    (weight,) = {part for name, part in runtime.packed.parts.items() if name == "layers.1.ffn.experts"}
    x, weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.full((5, 2), 0.5)
    one = plain.experts(weight, x, torch.tensor([[3, 8]] * 5), weights)
    torch.testing.assert_close(plain.experts(weight, x, torch.tensor([[3, 3]] * 5), weights), 2 * one)
    assert not plain.experts(weight, x, torch.full((5, 2), 8), weights).any()


def test_an_engine_writes_what_the_reference_writes(
    make_config: Make, tokenizer: Tokenizer, without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, with drafts, in company: rounding does not decide between tokens of a model with spread logits."""
    model, written = make_model(make_config), []
    for wish in ("", "reference"):
        monkeypatch.setattr(library, "WISH", wish)
        engine = Engine(Runtime(pack_model(model)), tokenizer, frozenset(), memory_bytes=2**24, max_running=3)
        done = engine.run([Request(text[:70], SamplingParams(max_tokens=12)) for text in some_texts()])
        written.append([completion.ids for (completion,) in done])
    assert written[0] == written[1]
