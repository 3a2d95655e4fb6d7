"""Continuous batching: the same bits alone and in company, greedy as elsewhere, routes, stops, limits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from completions import assert_same, run_all
from transformers import DeepseekV3ForCausalLM

from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.events import Completion, Failure
from moestro.engine.grammar import from_lark, from_regex
from moestro.engine.language_model import LanguageModel, load
from moestro.engine.paged_cache import Room, page_bytes, plan_room
from moestro.engine.sampler import Sampler
from moestro.engine.scheduler import QueueFullError
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import ConfigError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer, init_weights
from moestro.ops import library
from moestro.ops.precision import precision_of
from moestro.training.checkpoint import write_model_directory

Make = Callable[..., Config]
GROUPED = ("model.q_lora_rank=12", "model.num_groups=4", "model.top_k_groups=2")
ODD = (
    "model.hidden_dim=29",
    "model.num_experts=7",
    "model.expert_dim=11",
    "model.dense_dim=37",
    "model.kv_lora_rank=13",
)


def make_model(
    make_config: Make, tokenizer: Tokenizer, *overrides: str, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    model = Transformer(
        make_config("model.init_std=0.2", "model.max_seq_len=256", *overrides).model, precision_of(dtype)
    )
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(7)
    for _, router in model.routers():
        router.bias.copy_(torch.randn(len(router.bias), generator=generator) * 0.2 - 0.5)
    return LanguageModel(model, tokenizer, frozenset())


@pytest.fixture(scope="module")
def written(make_config: Make, tokenizer: Tokenizer) -> LanguageModel:
    return make_model(make_config, tokenizer, *GROUPED)


def engine_of(model: LanguageModel, num_pages: int = 64, **limits: int) -> Engine:
    size = page_bytes(model.model.config, model.model.dtype)
    return Engine(model.runtime, model.tokenizer, model.stop_ids, memory_bytes=num_pages * size, **limits)


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_requests(count: int, max_tokens: int = 12) -> list[Request]:
    """Prompts of 1 to 150 tokens; every third begins with the same 70; greedy and sampled ones in turn."""
    lengths = [5, 80, 150, 1, 64, 97, 33, 128, 65, 16, 71, 9, 140, 63, 2, 100]
    requests = []
    for i, length in enumerate(lengths[:count]):
        prompt = (random_ids(70, 99) + random_ids(length, i)) if i % 3 == 1 else random_ids(length, i)
        params = SamplingParams(
            max_tokens=max_tokens + i % 3,
            temperature=0.9 * (i % 2),
            top_p=0.95,
            seed=i,
            logprobs=2,
            prompt_logprobs=1 if i % 4 == 0 else None,
            return_routes=True,
        )
        requests.append(Request(prompt, params))
    return requests


def check_company(model: LanguageModel, sizes: tuple[int, ...], max_tokens: int) -> None:
    """Each request alone, then batches of `sizes` with chunked prompts beside decoding sequences."""
    requests = mixed_requests(max(sizes), max_tokens)
    alone = [run_all(engine_of(model), [request])[0] for request in requests]
    for size in sizes:
        together = run_all(engine_of(model, token_budget=61, max_running=16), requests[:size])
        for one, other in zip(alone, together, strict=False):
            assert_same(one, other)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (GROUPED, torch.float32),
        (GROUPED, torch.bfloat16),
        (ODD, torch.float32),
        (("model.attention=gqa", "model.num_heads=4", "model.num_kv_heads=2"), torch.float32),
        (("model.router.score=sqrt_softplus", "model.router.num_hash_layers=1"), torch.float32),
    ],
    ids=["mla", "bf16", "odd sizes", "gqa", "v4 router"],
)
def test_company_changes_no_bit(
    make_config: Make, tokenizer: Tokenizer, overrides: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = make_model(make_config, tokenizer, *overrides, dtype=dtype)
    check_company(model, (1, 2, 5, 16) if overrides is GROUPED else (16,), max_tokens=6)


def test_company_changes_no_bit_under_the_specifications(
    written: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load_library", lambda: None)
    monkeypatch.setattr(library, "WISH", "reference")
    check_company(written, (5,), max_tokens=4)


def test_threads_do_not_make_company_matter(written: LanguageModel) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check_company(written, (5,), max_tokens=3)
    finally:
        torch.set_num_threads(threads)


def test_preemption_changes_no_bit(written: LanguageModel) -> None:
    requests = [
        Request(random_ids(length, length), replace(request.params, max_tokens=30))
        for length, request in zip((60, 50, 62, 40, 110), mixed_requests(5), strict=True)
    ]
    alone = [run_all(engine_of(written), [request])[0] for request in requests]
    engine = engine_of(written, num_pages=4, token_budget=90, max_running=8)
    together = run_all(engine, requests)
    assert engine.scheduler.num_preemptions > 1
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)
    pool = engine.scheduler.pool
    assert pool.num_available == pool.num_pages == 4


def test_a_prefix_that_others_left_changes_no_bit(written: LanguageModel) -> None:
    beginning = random_ids(100, 5)
    params = SamplingParams(max_tokens=60, logprobs=1, return_routes=True)
    engine = engine_of(written)
    first = run_all(engine, [Request(beginning, params)])[0]
    # the next turn of a conversation: pages that were decoded are now a prompt
    follow_up = Request(beginning + first.ids + [7, 8], SamplingParams(max_tokens=9, logprobs=1, return_routes=True))
    engine.add(follow_up)
    assert [row.sequence.num_computed for row in engine.scheduler.schedule()] == [128]
    engine.abort(1)
    again = run_all(engine, [follow_up])[0]
    assert_same(again, run_all(engine_of(written), [follow_up])[0])
    assert again.routes is not None and first.routes is not None
    assert torch.equal(again.routes[: len(first.routes)], first.routes)


@pytest.mark.parametrize("overrides", [["model.mtp_depth=0"], ["model.mtp_depth=1", *GROUPED]])
def test_greedy_equals_generate_and_transformers(
    make_config: Make, tokenizer: Tokenizer, tmp_path: Path, overrides: list[str]
) -> None:
    write_model_directory(tmp_path, make_model(make_config, tokenizer, *overrides).model, tokenizer)
    ours = load(tmp_path)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = [[0, *random_ids(length, length)] for length in (3, 70, 30, 140)]
    params = SamplingParams(max_tokens=20)
    found = run_all(engine_of(ours, token_budget=50, max_running=4), [Request(p, params) for p in prompts])
    for prompt, completion in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, pad_token_id=2
        )
        assert completion.ids == expected[0, len(prompt) :].tolist() == ours.generate(prompt, max_tokens=20).ids


def test_logprobs_and_routes_are_those_of_the_whole_text(written: LanguageModel) -> None:
    prompt = random_ids(90, 3)
    params = SamplingParams(max_tokens=40, temperature=1.0, logprobs=3, prompt_logprobs=2, return_routes=True)
    engine = engine_of(written, token_budget=37, max_running=4)
    company = Request(random_ids(100, 4), SamplingParams(max_tokens=90))
    _, found = run_all(engine, [company, Request(prompt, params)])
    text = prompt + found.ids
    with torch.no_grad():
        output = written.model(torch.tensor(text), AttentionBatch.causal(1, len(text)), logits=True)
        expected = output.logits.log_softmax(-1)
    assert found.prompt_logprobs is not None and len(found.prompt_logprobs) == len(prompt) - 1
    for position, scored in enumerate([*found.prompt_logprobs, *found.logprobs]):
        best = expected[position].topk(len(scored.top))
        assert scored.token == text[position + 1]
        assert scored.logprob == pytest.approx(float(expected[position, scored.token]), abs=1e-4)
        assert [id for id, _ in scored.top] == best.indices.tolist()
        assert [value for _, value in scored.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert found.routes is not None
    assert torch.equal(found.routes.long(), torch.stack([r.ids for r in output.routes], dim=1)[:-1])


def test_the_first_event_brings_the_prompt_and_the_last_the_reason(written: LanguageModel) -> None:
    engine = engine_of(written, draft_tokens=0)
    request = engine.add(Request([5, 6, 7], SamplingParams(max_tokens=3, prompt_logprobs=0, return_routes=True)))
    events = [engine.step() for _ in range(3)]
    assert [[(e.request_id, e.index, e.finish_reason) for e in step] for step in events] == [
        [(request, 0, None)],
        [(request, 0, None)],
        [(request, 0, "length")],
    ]
    assert [step[0].prompt_logprobs is not None for step in events] == [True, False, False]
    assert [step[0].routes is not None for step in events] == [False, False, True]
    routes = events[2][0].routes
    assert routes is not None and len(routes) == 5
    for position, step in enumerate(events, start=2):  # the last token of the prompt gives the first one
        assert step[0].token_routes is not None and torch.equal(step[0].token_routes, routes[position])
    assert engine.step() == []


def test_a_prompt_can_be_scored_without_a_continuation(written: LanguageModel) -> None:
    prompt = random_ids(150, 8)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine = engine_of(written, token_budget=40, max_running=4)
    for _ in range(2):  # the second time the pages are known, and computed all the same
        found = run_all(engine, [Request(prompt, params)])[0]
        assert (found.ids, found.finish_reason) == ([], "length")
        assert found.prompt_logprobs is not None and len(found.prompt_logprobs) == 149


def test_stops_end_a_text(written: LanguageModel) -> None:
    ids = run_all(engine_of(written), [Request([5, 6], SamplingParams(max_tokens=16))])[0].ids
    text = [written.tokenizer.decode(ids[:n]) for n in range(17)]
    by_id = run_all(engine_of(written), [Request([5, 6], SamplingParams(stop_ids=frozenset([ids[4]])))])[0]
    assert (by_id.ids, by_id.finish_reason, by_id.stop_string) == (ids[: ids.index(ids[4]) + 1], "stop", None)
    stop = next(end for end in (one[-3:] for one in text[9:]) if "\ufffd" not in end)  # no half character
    by_text = run_all(engine_of(written), [Request([5, 6], SamplingParams(stop=("never!", stop)))])[0]
    count = min(n for n in range(17) if stop in text[n])
    assert (by_text.ids, by_text.finish_reason, by_text.stop_string) == (ids[:count], "stop", stop)
    ending = LanguageModel(written.model, written.tokenizer, frozenset([ids[2]]))
    assert run_all(engine_of(ending), [Request([5, 6])])[0].ids == ids[: ids.index(ids[2]) + 1]


def test_a_stop_string_is_found_between_tokens_that_are_not_spelled(
    written: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = written.tokenizer
    hidden = tokenizer.bos_id
    a, b, c, d = (tokenizer.pieces.index(letter.encode()) for letter in "abcd")
    script = iter([hidden, a, *[hidden] * 9, b, c, hidden, hidden, d, a, a, a, a])
    monkeypatch.setattr(written.runtime, "logits", lambda _: torch.eye(tokenizer.vocab_size)[[next(script)]])
    request = Request([5, 6], SamplingParams(max_tokens=20, stop=("abcd",)))
    found = run_all(engine_of(written, draft_tokens=0), [request])[0]
    assert tokenizer.decode(found.ids) == "abcd"
    assert (len(found.ids), found.finish_reason, found.stop_string) == (16, "stop", "abcd")


def test_events_bring_the_text_of_those_who_want_it(written: LanguageModel) -> None:
    tokenizer, params = written.tokenizer, SamplingParams(max_tokens=40, temperature=1.5, seed=3)
    control = frozenset(tokenizer.specials.values())
    bias = dict.fromkeys(control, 6.0)
    wanted = [
        params,
        replace(params, return_text=True),
        replace(params, return_text=True, logit_bias=bias),
        replace(params, return_text=True, logit_bias=bias, spelled_ids=control),
    ]
    silent, plain, hidden, spelled = run_all(engine_of(written), [Request([5, 6], p) for p in wanted])
    assert silent.text == "" and silent.ids == plain.ids
    assert plain.text == tokenizer.decode(plain.ids)
    assert hidden.ids == spelled.ids and control & set(hidden.ids)
    assert hidden.text == tokenizer.decode(hidden.ids)
    assert spelled.text == tokenizer.decode(spelled.ids, skip_special=False)
    stop = plain.text[12:15]
    cut = run_all(engine_of(written), [Request([5, 6], replace(params, return_text=True, stop=(stop,)))])[0]
    assert (cut.text, cut.stop_string) == (plain.text[: plain.text.find(stop)], stop)


def test_what_is_raised_while_sampling_is_logged_and_fails_one_request_alone(
    written: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise ZeroDivisionError("a bug in the sampler")

    monkeypatch.setattr(Sampler, "choose", fail)
    sampled, greedy = Request([5], SamplingParams(temperature=1.0)), Request([6], SamplingParams(max_tokens=3))
    failed, other = run_all(engine_of(written), [sampled, greedy])
    assert failed.error == Failure("engine", "a bug in the sampler") and other.finish_reason == "length"
    (record,) = caplog.records
    assert record.name == "moestro.engine" and record.exc_info and record.exc_info[0] is ZeroDivisionError


def test_streams_run_and_step_do_not_take_each_others_events(written: LanguageModel) -> None:
    requests = [Request([5 + i, 6], SamplingParams(max_tokens=9 + i, n=1 + i % 2)) for i in range(3)]
    alone = [engine_of(written).run([request])[0] for request in requests]
    engine = engine_of(written)
    added = engine.add(requests[0])
    stream = engine.stream(requests[1])
    found = [[Completion()], [Completion(), Completion()]]
    for event in stream:
        found[1][event.index].add(event)
    while engine.has_work:
        for event in engine.step():
            assert event.request_id == added
            found[0][event.index].add(event)
    open_stream = engine.stream(requests[1])
    next(open_stream)
    found.append(engine.run([requests[2]])[0])
    open_stream.close()
    for one, other in zip(found, alone, strict=True):
        for completion, expected in zip(one, other, strict=True):
            assert_same(completion, expected)
    assert engine.is_empty and not engine.running_ids


def test_n_continuations_are_those_of_n_seeds(written: LanguageModel) -> None:
    prompt = random_ids(70, 1)
    settings = {"max_tokens": 8, "temperature": 1.0, "top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1}
    (found,) = engine_of(written).run([Request(prompt, SamplingParams(n=3, seed=4, **settings))])
    single = run_all(engine_of(written), [Request(prompt, SamplingParams(seed=s, **settings)) for s in (4, 5, 6)])
    assert [c.ids for c in found] == [c.ids for c in single]
    assert len({tuple(c.ids) for c in found}) == 3


def test_an_aborted_request_leaves_nothing_and_disturbs_nobody(written: LanguageModel) -> None:
    engine = engine_of(written)
    stays = Request(random_ids(80, 2), SamplingParams(max_tokens=10, logprobs=0, return_routes=True))
    ids = [engine.add(Request(random_ids(90, 1), SamplingParams(n=2))), engine.add(stays)]
    found = Completion()
    for step in range(11):
        for event in engine.step():
            if event.request_id == ids[1]:
                found.add(event)
        if step == 3:
            assert engine.abort(ids[0])
            assert not engine.abort(ids[0])
    assert not engine.has_work
    assert_same(found, run_all(engine_of(written), [stays])[0])
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages


def test_numbers_that_are_not_finite_end_one_request_alone(
    written: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, logits = engine_of(written), written.runtime.logits
    monkeypatch.setattr(written.runtime, "logits", lambda h: logits(h).index_fill(0, torch.tensor([1]), math.nan))
    good, bad = run_all(engine, [Request([5, 6], SamplingParams(max_tokens=1)), Request([7], SamplingParams())])
    assert (len(good.ids), good.finish_reason) == (1, "length")
    assert (bad.ids, bad.finish_reason) == ([], "error")
    assert bad.error == Failure("engine", "the model's numbers are not finite")
    assert not engine.has_work


@pytest.mark.parametrize(
    ("params", "kind", "named"),
    [
        ({"temperature": 1.0, "repetition_penalty": 1e-300}, "request", "infinite"),
        ({"grammar": from_lark('start: "a" <｜User｜>')}, "grammar", "no token"),  # a control token: never allowed
        (
            {"grammar": from_lark("start: " + " | ".join(f'"a" "b{i}"' for i in range(2300)))},
            "grammar",
            "items",
        ),  # more work in a step than allowed
    ],
)
def test_a_request_that_raises_in_a_step_fails_alone(
    written: LanguageModel, params: dict[str, object], kind: str, named: str
) -> None:
    good = Request(random_ids(20, 1), SamplingParams(max_tokens=9, logprobs=1, return_routes=True))
    alone = run_all(engine_of(written), [good])[0]
    engine = engine_of(written)
    bad = Request([5, 6], SamplingParams(**params))  # type: ignore[arg-type]
    first, failed, last = run_all(engine, [good, bad, good])
    assert_same(first, alone)
    assert_same(last, alone)
    assert failed.finish_reason == "error" and failed.error is not None
    assert failed.error.kind == kind and named in failed.error.message
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages


def test_grammars_bind_greedy_and_sampled_text(written: LanguageModel) -> None:
    pattern = r"[a-f]{3}-[0-9]{2,3}"
    params = [
        SamplingParams(grammar=from_regex(pattern), temperature=t, seed=s, n=4) for t in (0.0, 1.5) for s in (0, 9)
    ]
    for completions in engine_of(written).run([Request([9], p) for p in params]):
        for completion in completions:
            assert completion.finish_reason == "stop"
            assert re.fullmatch(pattern, written.tokenizer.decode(completion.ids))
    with pytest.raises(ConfigError, match="cannot be used"):
        engine_of(written).add(Request([9], SamplingParams(grammar="start: missing")))


def test_the_figures_are_those_of_what_was_done(written: LanguageModel) -> None:
    engine = engine_of(written, max_running=1, token_budget=50, draft_tokens=0)
    prompt = random_ids(130, 1)
    for _ in range(3):
        engine.add(Request(prompt, SamplingParams(max_tokens=5)))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages, stats.pages_used) == (1, 2, 4, 3)
    assert (stats.prompt_tokens, stats.generated_tokens) == (0, 0)
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used, stats.preemptions) == (0, 0, 0, 0)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.prefix_hit_tokens) == (390, 15, 256)
    assert (stats.drafted, stats.accepted, stats.speculation_off) == ([], [], 0)
    # every token but the last of each text is computed, but for the two prefixes that were found
    routes = run_all(engine_of(written), [Request(prompt, SamplingParams(max_tokens=5, return_routes=True))])[0].routes
    assert routes is not None
    whole, rest = (torch.stack([part[:, 0].flatten().long()]).flatten() for part in (routes, routes[128:]))
    expected = whole.bincount(minlength=8) + 2 * rest.bincount(minlength=8)
    assert torch.equal(stats.loads, expected[None])


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ([], {}, "empty"),
        ([1] * 250, {"max_tokens": 7}, "256"),
        ([300], {}, "vocabulary"),
        ([1], {"logit_bias": {-1: 3.0}}, "vocabulary"),
        ([1], {"temperature": math.nan}, "temperature"),
        ([1], {"n": 0}, "n must"),
        ([1], {"logprobs": 21}, "logprobs"),
        ([1], {"min_p": 1.5}, "min_p"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"repetition_penalty": 0.0}, "repetition"),
        ([1], {"seed": -1}, "seed"),
        ([1], {"logit_bias": {1: math.inf}}, "logit_bias"),
        ([1], {"stop": ("",)}, "stop"),
    ],
)
def test_what_cannot_be_served_is_refused(
    written: LanguageModel, prompt: list[int], params: dict[str, object], named: str
) -> None:
    engine = engine_of(written)
    with pytest.raises(ConfigError, match=named):
        engine.add(Request(prompt, SamplingParams(**params)))  # type: ignore[arg-type]
    assert not engine.has_work


def test_limited_room_of_experts_is_for_training_alone(make_config: Make, tokenizer: Tokenizer) -> None:
    """Served, every choice is carried out, so that batch-mates cannot take a token's place."""
    models = [make_model(make_config, tokenizer, f"model.router.capacity.eval_factor={f}") for f in (0, 0.5)]
    free, limited = (run_all(engine_of(model), mixed_requests(3)) for model in models)
    for one, other in zip(free, limited, strict=True):
        assert_same(one, other)


def test_memory_that_does_not_suffice_is_refused(written: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="one sequence of 200 tokens, and has"):
        engine_of(written, num_pages=3, max_context=200)
    config = written.model.config
    size = page_bytes(config, torch.bfloat16)
    assert size == 64 * (3 * (16 + 4) * 2 + 1 * 2 * 2)  # two layers and an MTP module
    assert plan_room(config, torch.bfloat16, 5, 10 * size + 1) == Room(10, 256)
    assert plan_room(config, torch.bfloat16, 5, 1000 * size) == Room(20, 256)
    engine = engine_of(written, max_waiting=1)
    engine.add(Request([1]))
    with pytest.raises(QueueFullError):
        engine.add(Request([1]))
