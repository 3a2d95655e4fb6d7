"""A directory's way of sampling and its ends of text are what other readers find in the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from moestro.engine.conversation import Conversation
from moestro.engine.defaults import GenerationDefaults, read_defaults, read_stop_ids
from moestro.engine.language_model import LanguageModel, load
from moestro.errors import CheckpointError


def write(folder: Path, name: str = "generation_config.json", **tree: Any) -> Path:
    (folder / name).write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),
        ({"temperature": 0.3}, {"temperature": 0.3}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, {}),
        (
            {"do_sample": True, "temperature": None, "top_k": 20, "min_p": 0},
            {"temperature": 1.0, "top_k": 20, "min_p": 0},
        ),
        ({"top_k": -1, "repetition_penalty": 1.05}, {"top_k": 0, "repetition_penalty": 1.05}),
    ],
)
def test_recommendations(tmp_path: Path, tree: dict[str, Any], expected: dict[str, float]) -> None:
    assert read_defaults(write(tmp_path, **tree)).choose() == expected


def test_a_directory_without_the_file_recommends_nothing(tmp_path: Path) -> None:
    assert read_defaults(tmp_path) == GenerationDefaults()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "hot"), ("temperature", True), ("temperature", float("inf")), ("top_p", 0),
     ("top_p", 1.5), ("top_p", float("nan")), ("top_k", 2.5), ("top_k", -2), ("repetition_penalty", 0), ("min_p", [1])],
)  # fmt: skip
def test_values_that_cannot_be_sampled_with_are_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {name} is"):
        read_defaults(write(tmp_path, **{name: value}))


def test_what_is_given_wins() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_k=20)
    assert defaults.choose(temperature=0.0, top_p=None, seed=3) == {"temperature": 0.0, "top_k": 20, "seed": 3}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 9}, {1, 5, 6}),
        ({"eos_token_id": 5}, {}, {1, 5}),
        ({"temperature": 1.0}, {"eos_token_id": [7, 8]}, {1, 7, 8}),
        (None, {"eos_token_id": 7}, {1, 7}),
        (None, {"eos_token_id": None}, {1}),
        (None, None, {1}),
    ],
)
def test_ends_of_text(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    for name, tree in (("generation_config.json", generation), ("config.json", config)):
        if tree is not None:
            write(tmp_path, name, **tree)
    assert read_stop_ids(tmp_path, 1) == expected


@pytest.mark.parametrize("value", ["2", [1, "x"], True, {"a": 1}])
def test_ends_that_are_no_ids_are_named(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id is"):
        read_stop_ids(write(tmp_path, eos_token_id=value), 1)


def test_our_checkpoints_recommend_what_transformers_then_does(tiny_run: Path) -> None:
    model = load(tiny_run)
    theirs = GenerationConfig.from_pretrained(model.source.directory)  # type: ignore[union-attr]
    assert theirs.do_sample is True
    assert (theirs.temperature, theirs.top_p) == (model.defaults.temperature, model.defaults.top_p)
    assert {theirs.eos_token_id} == model.stop_ids


def test_a_conversation_samples_as_recommended_unless_told(tiny_run: Path) -> None:
    loaded = load(tiny_run)

    def say(model: LanguageModel, **settings: Any) -> str:
        return "".join(Conversation(model, max_tokens=16, **settings).reply("the cat"))

    def with_defaults(**values: float) -> LanguageModel:
        return LanguageModel(loaded.source, loaded.tokenizer, loaded.stop_ids, defaults=GenerationDefaults(**values))  # type: ignore[arg-type]

    hot, cold = with_defaults(temperature=50.0, top_p=1.0), with_defaults(temperature=0.0)
    assert say(cold) == say(hot, temperature=0.0) == say(cold, seed=5) != say(hot)
    assert say(with_defaults(top_k=1, temperature=50.0)) == say(cold)
    assert say(with_defaults()) == say(hot, temperature=0.7, top_p=0.9)
