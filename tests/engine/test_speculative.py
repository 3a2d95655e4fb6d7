"""Drafts: what they are, by the training forward; that they change no greedy token and no distribution; their cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from completions import assert_same, run_all
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine import speculative
from moestro.engine.engine import Engine
from moestro.engine.events import Completion
from moestro.engine.grammar import from_json_schema, from_regex
from moestro.engine.language_model import LanguageModel
from moestro.engine.paged_cache import page_bytes
from moestro.engine.sampler import Sampler
from moestro.engine.sequence import Request, SamplingParams
from moestro.engine.speculative import WINDOW, Drafting, draft_reach, estimate_cost
from moestro.engine.stats import DraftCounts
from moestro.errors import ConfigError
from moestro.model.attention import AttentionBatch, Context
from moestro.model.experts import MoE
from moestro.model.rope import rope_tables
from moestro.model.transformer import MTPModule, Transformer, init_weights

Make = Callable[..., Config]
SHAPES = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 5)]  # MTP modules, drafts a step


def make_model(make_config: Make, tokenizer: Tokenizer, depth: int, *overrides: str) -> LanguageModel:
    """Blocks that say little, so that the next token follows mostly from the last one, and modules that know that."""
    config = make_config("model.init_std=0.2", "model.max_seq_len=256", f"model.mtp_depth={depth}", *overrides).model
    model = Transformer(config)
    init_weights(model, 1)
    with torch.no_grad():
        for module in model.mtp:
            assert isinstance(module, MTPModule)
            module.project.weight[:] = torch.cat(
                [torch.eye(config.hidden_dim), 0.05 * module.project.weight[:, :32]], 1
            )
        for name, parameter in model.named_parameters():
            if ".out." in name or ".down." in name or name.endswith("experts.down"):
                parameter *= 0.12
        model.embed.weight *= 3.0
    return LanguageModel(model, tokenizer, frozenset())


@pytest.fixture(scope="module")
def models(make_config: Make, tokenizer: Tokenizer) -> dict[int, LanguageModel]:
    return {depth: make_model(make_config, tokenizer, depth) for depth in (1, 2)}


def engine_of(model: LanguageModel, drafts: int, num_pages: int = 64, **limits: float) -> Engine:
    size = page_bytes(model.model.config, model.model.dtype) * num_pages
    limits = {"draft_cost": 0.0, **limits}
    return Engine(model.runtime, model.tokenizer, model.stop_ids, memory_bytes=size, draft_tokens=drafts, **limits)  # type: ignore[arg-type]


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(7, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def various_requests(max_tokens: int = 20) -> list[Request]:
    """Greedy and sampled in turn, each kind of setting; prompts around the ends of pages, three with one beginning."""
    extras = [
        {"logprobs": 2, "return_routes": True},
        {"prompt_logprobs": 1, "top_p": 0.9},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3},
        {"frequency_penalty": 0.5, "top_k": 40},
        {"logit_bias": {9: 4.0, 20: -9.0}},
        {"grammar": from_regex("([a-m]{3} )+"), "min_p": 0.01},
        {"draft_tokens": 0, "logprobs": 0},
        {"return_routes": True, "logprobs": 1},
    ]
    lengths = [62, 100, 63, 64, 5, 70, 90, 36]
    requests = []
    for i, (extra, length) in enumerate(zip(extras, lengths, strict=True)):
        prompt = random_ids(64, 99) + random_ids(length, i) if i in (1, 3, 7) else random_ids(length, i)
        params = SamplingParams(max_tokens=max_tokens + i, temperature=0.7 * (i % 2), seed=i)
        requests.append(Request(prompt, replace(params, **extra)))  # type: ignore[arg-type]
    return requests


def run_module(model: Transformer, index: int, hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """One MTP module over a whole text, as in training."""
    module = model.mtp[index]
    assert isinstance(module, MTPModule)
    batch = AttentionBatch.causal(1, len(tokens))
    ids = torch.tensor(tokens)
    context = Context(ids, rope_tables(model.config, batch.positions), batch)
    out: torch.Tensor = module(model.embed(ids), hidden, context)[0]
    return out


@torch.no_grad()
def draft_by_definition(model: Transformer, text: list[int], count: int) -> list[int]:
    """Each depth over the whole text; past the last one, its own output is the next position's hidden state."""
    known, computed, depth = text.copy(), len(text) - 1, len(model.mtp)
    before = hidden = model(torch.tensor(text[:-1]), AttentionBatch.causal(1, computed)).hidden
    for place in range(count):
        index = min(place, depth - 1)
        # past the last module, that one again, a position further
        before = hidden if place < depth else torch.cat([before, hidden[-1:]])
        hidden = run_module(model, index, before, known[1 + index : 1 + index + len(before)])
        assert model.head is not None
        known.append(int(model.head(hidden[-1]).argmax()))
    return known[len(text) :]


@pytest.mark.parametrize(("depth", "drafts"), SHAPES)
def test_drafts_are_what_the_modules_predict(models: dict[int, LanguageModel], depth: int, drafts: int) -> None:
    engine = engine_of(models[depth], drafts, token_budget=40, max_running=4)
    engine.add(Request(random_ids(100, 1), SamplingParams(max_tokens=40)))
    checked = 0
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            left = 100 + 40 - len(sequence.tokens)
            if sequence.generated:
                expected = draft_by_definition(models[depth].model, sequence.tokens, min(drafts, left - 1))
                assert sequence.drafts == expected
                checked += len(expected)
    assert checked > 15 * min(drafts, 2)
    counts = engine.stats()
    assert 0 < counts.accepted[0] < counts.drafted[0]
    assert counts.accepted == sorted(counts.accepted, reverse=True)


@pytest.mark.parametrize(("depth", "drafts"), SHAPES)
def test_greedy_is_token_for_token_as_without(models: dict[int, LanguageModel], depth: int, drafts: int) -> None:
    requests = [
        replace(request, params=replace(request.params, temperature=0.0, draft_tokens=None))
        for request in various_requests(40)
    ]
    plain = run_all(engine_of(models[depth], 0), requests)
    engine = engine_of(models[depth], drafts, token_budget=64, max_running=5)
    for one, other in zip(plain, run_all(engine, requests), strict=True):
        assert_same(one, other)
        assert one.drafts is None and other.drafts is not None and sum(other.drafts.drafted) > 0
    assert 0.1 < engine.stats().accepted[0] / engine.stats().drafted[0] < 0.95
    pool = engine.scheduler.pool
    assert pool.num_available == pool.num_pages


@pytest.mark.parametrize(("depth", "drafts"), [(1, 1), (1, 4), (2, 3)])
def test_company_chunks_and_preemption_change_no_bit(models: dict[int, LanguageModel], depth: int, drafts: int) -> None:
    requests = various_requests(45)
    alone = [run_all(engine_of(models[depth], drafts), [request])[0] for request in requests]
    roomy = engine_of(models[depth], drafts, token_budget=61, max_running=8)
    for _ in range(2):  # the second time with what the first has left in the cache
        for one, other in zip(alone, run_all(roomy, requests), strict=True):
            assert_same(one, other)
    assert roomy.stats().prefix_hit_tokens >= 64 * 4
    sampled = [completion.drafts for completion in alone[1:6:2]]
    assert all(report is not None and 0 < sum(report.accepted) < sum(report.drafted) for report in sampled)


@pytest.mark.parametrize(("depth", "drafts"), [(1, 1), (1, 4), (2, 3)])
def test_preemption_changes_no_bit(models: dict[int, LanguageModel], depth: int, drafts: int) -> None:
    requests = [
        replace(request, prompt=random_ids(length, length), params=replace(request.params, max_tokens=90))
        for request, length in zip(various_requests(), (30, 40, 20, 50, 45, 33, 8, 60), strict=True)
    ]
    alone = [run_all(engine_of(models[depth], drafts), [request])[0] for request in requests]
    engine = engine_of(models[depth], drafts, num_pages=6, token_budget=61, max_running=6)
    for one, other in zip(alone, run_all(engine, requests), strict=True):
        assert_same(one, other)
    assert engine.stats().preemptions > 3
    assert engine.scheduler.pool.num_available == 6


def test_n_continuations_and_stops_are_those_of_single_requests(models: dict[int, LanguageModel]) -> None:
    prompt = random_ids(60, 3)
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=5)
    (many,) = engine_of(models[1], 3).run([Request(prompt, replace(params, n=3))])
    for index, completion in enumerate(many):
        single = run_all(engine_of(models[1], 3), [Request(prompt, replace(params, seed=5 + index))])[0]
        assert_same(completion, single)
    ids = run_all(engine_of(models[1], 0), [Request(prompt, SamplingParams(max_tokens=30))])[0].ids
    tokenizer = models[1].tokenizer

    def whole(ids: list[int]) -> str:
        """Text without the beginning of a character at its end, which has not been seen yet."""
        return "".join([*tokenizer.decode_stream(ids)][:-1])

    for end in range(3, 12):
        by_id = run_all(
            engine_of(models[1], 3), [Request(prompt, SamplingParams(stop_ids=frozenset(ids[end : end + 1])))]
        )
        assert (by_id[0].ids, by_id[0].finish_reason) == (ids[: ids.index(ids[end]) + 1], "stop")
        text = tokenizer.decode(ids[end - 1 : end + 1])
        if "\ufffd" in text:  # half a character is no text yet
            continue
        by_text = run_all(engine_of(models[1], 3), [Request(prompt, SamplingParams(stop=(text,), return_routes=True))])[
            0
        ]
        count = min(n for n in range(31) if text in whole(ids[:n]))
        assert (by_text.ids, by_text.stop_string) == (ids[:count], text)
        assert by_text.routes is not None and len(by_text.routes) == 60 + count - 1


def test_a_grammar_holds_for_what_is_drafted_and_ends_the_text(models: dict[int, LanguageModel]) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["moon", "tree"]}, "b": {"enum": [12, 345]}}}
    grammar = from_json_schema({**schema, "required": ["a", "b"], "additionalProperties": False})
    params = [
        SamplingParams(max_tokens=120, grammar=grammar, temperature=t, seed=s) for t in (0, 1.0) for s in range(3)
    ]
    engine = engine_of(models[1], 3)
    found = run_all(engine, [Request(random_ids(20, 1), p) for p in params])
    finished = [completion for completion in found if completion.finish_reason == "stop"]
    assert finished
    for completion in finished:
        text = engine.tokenizer.decode(completion.ids)
        assert text[0] == "{" and text[-1] == "}" and '"a"' in text
    assert engine.stats().accepted[0] > engine.stats().drafted[0] / 2  # much of it is forced


def chi_square_limit(freedom: int) -> float:
    """What chance alone exceeds once in 30000 times (Wilson and Hilferty: the cube root is nearly normal)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4 * spread**0.5) ** 3


def exact_distribution(
    model: Transformer, prompt: list[int], params: SamplingParams, count: int
) -> dict[tuple[int, ...], float]:
    """Probabilities of all continuations of `count` tokens under top-k alone."""
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        longer = {}
        for path, weight in paths.items():
            tokens = torch.tensor([*prompt, *path])
            with torch.no_grad():
                logits = model(tokens, AttentionBatch.causal(1, len(tokens)), logits=True).logits[-1]
            values, ids = (logits / params.temperature).topk(params.top_k)
            for p, id in zip(values.softmax(0).tolist(), ids.tolist(), strict=True):
                longer[*path, id] = weight * p
        paths = longer
    return paths


@pytest.mark.parametrize(("depth", "drafts"), [(1, 2), (2, 3)])
def test_sampling_keeps_the_distribution_of_the_model(
    models: dict[int, LanguageModel], depth: int, drafts: int
) -> None:
    prompt, draws = random_ids(12, 5), 2000
    params = SamplingParams(max_tokens=5, temperature=0.6, top_k=2)
    engine = engine_of(models[depth], drafts)
    seeds = [replace(params, seed=1000 * s, n=100) for s in range(draws // 100)]
    found = [c for many in engine.run([Request(prompt, p) for p in seeds]) for c in many]
    stats = engine.stats()
    assert all(0.1 * d < a < 0.9 * d for a, d in zip(stats.accepted[:2], stats.drafted[:2], strict=True))
    expected = exact_distribution(models[depth].model, prompt, params, 5)
    seen = Counter(tuple(completion.ids) for completion in found)
    assert set(seen) <= set(expected)
    statistic = sum((seen[path] - draws * p) ** 2 / (draws * p) for path, p in expected.items())
    freedom = len(expected) - 1
    assert freedom == 31 and min(expected.values()) * draws > 1
    assert statistic < chi_square_limit(freedom)


def mtp_rows(engine: Engine, text: list[int], pages: int) -> list[torch.Tensor]:
    """The rows of all layers in the pages that are known for a text."""
    found = engine.scheduler.pool.find_prefix(text, pages * 64)
    assert len(found) == pages
    return [pages[found].clone() for layer in engine.cache.layers for pages in layer.values()]


@pytest.mark.parametrize(("depth", "drafts"), [(1, 3), (2, 2)])
def test_shared_pages_hold_what_a_fresh_prefill_writes(
    models: dict[int, LanguageModel], monkeypatch: pytest.MonkeyPatch, depth: int, drafts: int
) -> None:
    monkeypatch.setattr(speculative, "WINDOW", 8)
    prompt = random_ids(50, 2)
    params = SamplingParams(max_tokens=160, temperature=0.9, seed=1)
    for cost in (0.0, 9.0):  # the second gives drafting up, and its pages are shared all the same
        decoded, fresh = engine_of(models[depth], drafts, draft_cost=cost), engine_of(models[depth], drafts)
        completion = run_all(decoded, [Request(prompt, params)])[0]
        assert completion.drafts is not None and (completion.drafts.off_after is None) == (cost == 0.0)
        text = prompt + completion.ids
        run_all(fresh, [Request(text, SamplingParams(max_tokens=0))])
        for one, other in zip(mtp_rows(decoded, text, 3), mtp_rows(fresh, text, 3), strict=True):
            assert torch.equal(one, other)


def test_texts_that_part_behind_a_page_do_not_share_it(models: dict[int, LanguageModel]) -> None:
    common, params = random_ids(128, 4), SamplingParams(max_tokens=30, temperature=0.9)
    requests = [Request([*common, last], params) for last in (30, 31, 30)]
    alone = [run_all(engine_of(models[1], 2), [request])[0] for request in requests]
    engine = engine_of(models[1], 2)
    hits = []
    for request, expected in zip(requests, alone, strict=True):
        before = engine.stats().prefix_hit_tokens
        assert_same(run_all(engine, [request])[0], expected)
        hits.append(engine.stats().prefix_hit_tokens - before)
    assert hits == [0, 64, 128]


def test_drafts_that_do_not_pay_are_given_up(models: dict[int, LanguageModel]) -> None:
    request = Request(random_ids(10, 1), SamplingParams(max_tokens=200))
    plain = run_all(engine_of(models[1], 0), [request])[0]
    engine = engine_of(models[1], 2, draft_cost=2.0)  # not even two right drafts would be worth it
    found = run_all(engine, [request, replace(request, params=replace(request.params, draft_tokens=0))])
    assert [c.ids for c in found] == [plain.ids] * 2
    report = found[0].drafts
    assert report is not None and report.off_after is not None and found[1].drafts is None
    assert report.drafted[0] == WINDOW
    assert report.off_after == 1 + WINDOW + sum(report.accepted)
    stats = engine.stats()
    assert (stats.speculation_off, tuple(stats.drafted), tuple(stats.accepted)) == (1, report.drafted, report.accepted)
    assert run_all(engine_of(models[1], 2, draft_cost=0.05), [request])[0].drafts.off_after is None  # type: ignore[union-attr]


def test_what_pays_is_measured_per_draft_over_the_last_checks() -> None:
    drafting = Drafting(Sampler(0.0, 1.0, 0), 2)
    for _ in range(WINDOW - 1):
        drafting.count(2, 0)
    assert drafting.pays(9.0)  # too early to tell
    for accepted in [1] * (WINDOW - 1) + [2]:
        drafting.count(2, accepted)
    assert (drafting.pays((WINDOW + 1) / (2 * WINDOW)), drafting.pays(0.51)) == (True, False)
    assert drafting.report() == DraftCounts((2 * WINDOW - 1,) * 2, (WINDOW, 1), None)


def test_what_cannot_draft_is_refused(
    make_config: Make, tokenizer: Tokenizer, models: dict[int, LanguageModel]
) -> None:
    without = make_model(make_config, tokenizer, 0)
    for model, drafts in ((without, 0), (models[2], 1)):
        assert Engine(model.runtime, model.tokenizer, model.stop_ids, max_running=2).draft_tokens == drafts
    with pytest.raises(ConfigError, match="no MTP modules"):
        engine_of(without, 1)
    with pytest.raises(ConfigError, match="between 0 and 8"):
        engine_of(models[1], 9)
    with pytest.raises(ConfigError, match="exceeds the engine's 1"):
        engine_of(models[1], 1).add(Request([1], SamplingParams(draft_tokens=2)))
    with pytest.raises(ConfigError, match="with 3 drafts each"):
        engine_of(models[1], 3, token_budget=31, max_running=8)
    assert [draft_reach(k, d) for k, d in ((0, 1), (1, 1), (3, 1), (2, 2))] == [0, 1, 5, 2]


@pytest.mark.parametrize(
    "overrides", [(), ("model.q_lora_rank=12",), ("model.attention=gqa", "model.num_heads=4", "model.num_kv_heads=2")]
)
def test_the_cost_of_a_draft_counts_the_weights_it_reads(make_config: Make, overrides: tuple[str, ...]) -> None:
    config = make_config("model.num_layers=3", *overrides).model
    model = Transformer(config)

    def count(module: torch.nn.Module) -> int:
        """Numbers that a token reads, routed experts apart."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return sum(tensor.numel() for name, tensor in tensors if ".experts." not in name)

    experts = config.top_k * 3 * config.expert_dim * config.hidden_dim
    num_moe = sum(isinstance(block.ffn, MoE) for block in model.layers)  # type: ignore[union-attr]
    head = config.vocab_size * config.hidden_dim
    step = count(model.layers) + count(model.norm) + num_moe * experts + head
    module = count(model.mtp) + experts + head
    others = num_moe * experts * (1 - config.top_k / config.num_experts)
    assert estimate_cost(config) == pytest.approx((module + others) / step)


LOADS = st.tuples(
    st.integers(0, 7),  # which request
    st.integers(0, 6),  # steps before the next one comes
    st.one_of(st.none(), st.integers(0, 25)),  # steps after which it is cancelled
)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.lists(LOADS, min_size=3, max_size=9), st.integers(5, 9), st.integers(1, 5), st.sampled_from([0, 3, 40]))
def test_random_loads_give_each_request_its_own_tokens(
    models: dict[int, LanguageModel],
    expected: list[Completion],
    loads: list[tuple[int, int, int | None]],
    num_pages: int,
    max_running: int,
    budget: int,
) -> None:
    engine = engine_of(models[1], 2, num_pages, token_budget=max_running * 3 + budget, max_running=max_running)
    requests, arrivals, step = various_requests(), iter(loads), 0
    next_step, left = 0, len(loads)
    found: dict[int, tuple[int, Completion]] = {}
    cancelled: dict[int, int] = {}
    while engine.has_work or left:
        while left and step >= next_step:
            which, pause, patience = next(arrivals)
            number = engine.add(requests[which])
            found[number] = which, Completion()
            if patience is not None:
                cancelled[number] = step + patience
            next_step, left = step + pause, left - 1
        gone = {number for number, at in cancelled.items() if at <= step}
        for number in gone:
            engine.abort(number)
        for event in engine.step():
            assert event.request_id not in gone
            found[event.request_id][1].add(event)
        check_pages(engine)
        step += 1
    for number, (which, completion) in found.items():
        if number in cancelled:
            assert completion.ids == expected[which].ids[: len(completion.ids)]
        else:
            assert_same(completion, expected[which])


@pytest.fixture(scope="module")
def expected(models: dict[int, LanguageModel]) -> list[Completion]:
    return [run_all(engine_of(models[1], 2), [request])[0] for request in various_requests()]


def check_pages(engine: Engine) -> None:
    """Every page is held by those who list it; none that may be written to is shared."""
    running, pool = engine.scheduler.running, engine.scheduler.pool
    held = Counter(page for sequence in running for page in sequence.pages)
    assert pool.references == [held[page] for page in range(pool.num_pages)]
    assert pool.num_available == pool.num_pages - len(held)
    for sequence in running:
        assert all(held[page] == 1 for page in sequence.pages[sequence.num_ready // 64 :])
        assert sequence.num_ready <= sequence.num_computed <= len(sequence.tokens)
