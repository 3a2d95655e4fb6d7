"""The rule from text and time to size and steps, and what a plan warns of."""

from __future__ import annotations

import pytest

from moestro.config import Config, build_config
from moestro.data.documents import Document
from moestro.data.survey import DomainText, Survey
from moestro.data.tokenizer import Tokenizer
from moestro.model.size import measure_size, training_flops
from moestro.sizes import TOKENS_PER_PARAMETER, active_parameters, tree_of_depth
from moestro.training import plan

TOKENIZER = Tokenizer.builtin()


def make_survey(*documents: tuple[str, str], complete: bool = True) -> Survey:
    survey = Survey("folder", files=1, complete=complete)
    for domain, text in documents:
        survey.domains.setdefault(domain, DomainText()).add(Document(text, domain), len(text.encode()))
        survey.sample.append(text)
    return survey


def sized_survey(num_bytes: int, documents: int = 100, *, complete: bool = True) -> Survey:
    return Survey("folder", complete=complete, domains={"text": DomainText(num_bytes, documents, True)})


@pytest.mark.parametrize(
    ("num_bytes", "vocabulary"),
    [(1000, 512), (499_999, 512), (512_000, 1024), (3_000_000, 4096), (4_096_000, 8192), (10**12, 8192)],
)
def test_the_vocabulary_grows_with_the_text(num_bytes: int, vocabulary: int) -> None:
    assert plan.choose_vocabulary(sized_survey(num_bytes)) == vocabulary


def test_a_stream_has_the_largest_vocabulary() -> None:
    assert plan.choose_vocabulary(sized_survey(1000, complete=False)) == 8192


def test_the_depth_is_the_largest_whose_tokens_fit_text_and_time() -> None:
    for depth in (3, 5, 9):
        config = build_config(plan.fit_tree(depth, 4096))
        tokens = TOKENS_PER_PARAMETER * active_parameters(tree_of_depth(depth)["model"])
        flops = tokens * training_flops(config.model, config.train.seq_len)
        assert plan.choose_depth(tokens, flops, 4096) == depth
        assert plan.choose_depth(tokens - 1, flops, 4096) == depth - 1
        assert plan.choose_depth(tokens, flops - 1, 4096) == depth - 1
        assert plan.choose_depth(float("inf"), flops, 4096) == depth
    assert plan.choose_depth(0, 0, 512) == 2


@pytest.mark.parametrize(
    ("active", "text", "fill", "tokens"),
    [
        (1_000_000, 10_000_000, False, 8_000_000),  # 8 tokens a parameter
        (1_000_000, 10_000_000, True, 40_000_000),  # there is time for more: four passes
        (1_000_000, 1_000_000, True, 8_000_000),  # a small text: its eight passes are within sixteen
        (10_000_000, 1_000_000, True, 16_000_000),  # sixteen passes are the most
        (10_000_000, 1_000_000, False, 16_000_000),
        (1_000_000, 1_000, False, 200 * 4000),  # and 200 steps the least
    ],
)
def test_steps_follow_from_parameters_and_passes(active: int, text: int, fill: bool, tokens: int) -> None:
    assert plan.most_steps(active, text, 4000, fill=fill) == tokens // 4000


def test_tokens_are_counted_as_shards_count_them() -> None:
    texts = [f"one cat and {number} dogs" for number in range(50)]
    config = build_config({"data": {"tokenizer": "builtin", "valid_fraction": 0.1}})
    size = plan.measure_text(make_survey(*(("text", text) for text in texts)), config, TOKENIZER)
    exact = sum(len(TOKENIZER.encode(text)) + 2 for text in texts)
    assert abs(size.train + size.held_out["text"] - exact) <= 1
    assert size.held_out["text"] == round(exact / 10)
    assert size.bytes_per_token == pytest.approx(sum(map(len, texts)) / (exact - 100))


def test_a_single_document_is_not_held_out_and_two_are_halved() -> None:
    size = plan.measure_text(make_survey(("a", "same"), ("a", "same"), ("b", "x y"), ("b", "y x")), Config(), TOKENIZER)
    assert size.held_out["a"] == 0 and 0 < size.held_out["b"] <= size.train


def planned(*overrides: str, seconds: float | None = 0.5, tokens: int = 100_000) -> plan.TrainingPlan:
    config = build_config({}, overrides)
    text = plan.TextSize(tokens, {"text": 0}, 3.0, 8192)
    return plan.plan_training(config, text, measure_size(config.model), seconds)


def test_a_plan_of_steps_and_one_of_minutes() -> None:
    made = planned("train.steps=200", "train.batch_size=4", "train.seq_len=250", "train.accumulate=2")
    assert (made.steps, made.tokens, made.passes, made.seconds) == (200, 400_000, 4.0, 100.0)
    assert made.tokens_per_second == 4000
    assert planned("train.steps=1000", "train.minutes=1").steps == 120
    assert planned("train.steps=50", "train.minutes=1").steps == 50
    assert planned("train.steps=50", "train.minutes=1", seconds=None).seconds is None


def test_evaluations_take_a_third_of_a_steps_time_per_token() -> None:
    config = build_config({}, ["train.steps=100", "train.eval_every=25", "train.eval_tokens=300"])
    text = plan.TextSize(100_000, {"a": 1000, "b": 200}, 3.0, 8192)
    assert plan.evaluation_tokens(config, text, 100) == 3 * (300 + 200) + 1200
    made = plan.plan_training(config, text, measure_size(config.model), 8192 / 1000)
    assert made.seconds == pytest.approx(100 * 8.192 + 2700 / 3 / 1000)


@pytest.mark.parametrize(
    ("overrides", "text", "survey", "expected"),
    [
        ([], plan.TextSize(10**7, {"a": 10**5}, 3.0, 8192), sized_survey(10**8), []),
        (["train.steps=1000"], plan.TextSize(10**6, {"a": 10**5}, 3.0, 8192), sized_survey(10**8), ["8 passes"]),
        ([], plan.TextSize(10**7, {"a": 0}, 3.0, 8192), sized_survey(10**8), ["nothing is held out, since"]),
        (
            [],
            plan.TextSize(10**7, {"a": 0, "b": 9999}, 3.0, 8192),
            sized_survey(10**8),
            ["held out of a: one"],
        ),
        ([], plan.TextSize(10**7, {"a": 700}, 3.0, 8192), sized_survey(10**8), ["about 700 tokens"]),
        ([], plan.TextSize(10**7, {"a": 9999}, 3.0, 8192), sized_survey(900_000), ["model.vocab_size=1024"]),
    ],
)
def test_warnings(overrides: list[str], text: plan.TextSize, survey: Survey, expected: list[str]) -> None:
    config = build_config({"data": {"source": "folder"}}, overrides)
    made = plan.plan_training(config, text, measure_size(config.model), 0.1)
    found = plan.warn(made, config, survey)
    assert len(found) == len(expected) and all(part in line for part, line in zip(expected, found, strict=True))


def test_hundreds_of_hours_are_said() -> None:
    config = build_config({"data": {"source": "builtin"}}, ["train.steps=100000"])
    text = plan.TextSize(10**9, {"a": 10**6}, 3.0, 8192)  # 278 hours of steps, the rest of evaluations
    (line,) = plan.warn(plan.plan_training(config, text, measure_size(config.model), 10.0), config, sized_survey(10**9))
    assert line.startswith("285 hours (12 days)")


def test_the_pace_leaves_time_to_warm_up() -> None:
    config = build_config({}, ["train.warmup_steps=50"])
    assert plan.pace(config, 40) == {"eval_every": 25, "checkpoint_every": 25, "eval_tokens": 16384, "warmup_steps": 4}
    assert plan.pace(config, 10_000)["eval_every"] == 500 and plan.pace(config, 10_000)["warmup_steps"] == 50
