"""Configuration: strict keys, clear messages, overrides, presets."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from moestro.config import apply_overrides, build_config, load_file, load_preset, preset_names
from moestro.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_headz=3"], "num_headz"),
        (["train.steps=0"], "train.steps"),
        (["train.steps=many"], "train.steps"),
        (["model.num_experts=10", "model.num_groups=4"], "num_experts=10"),
        (["model.top_k=40"], "top_k=40"),
        (["model.num_groups=2", "model.top_k_groups=3"], "top_k_groups=3"),
        (["model.num_dense_layers=9"], "num_dense_layers=9"),
        (["model.attention=gqa", "model.num_kv_heads=3"], "num_kv_heads=3"),
        (
            ["model.num_experts=8", "model.num_groups=8", "model.top_k_groups=8", "model.top_k=2"],
            "at least two",
        ),
        (["data.weights={a=-1}"], "negative"),
        (["model.rope_dim=3"], "model.rope_dim"),
        (["train.lr=nan"], "train.lr"),
        (["steps=4"], "section.key=value"),
        (["train.steps"], "section.key=value"),
        (["train.steps.more=1"], "train.steps"),
    ],
)
def test_what_no_run_can_use_is_named_in_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace(".", r"\.")) as caught:
        build_config({"train": {"steps": 5}}, overrides)
    assert "\n" not in str(caught.value)


def test_overrides_change_a_copy_and_read_toml_values() -> None:
    tree = {"train": {"steps": 5}}
    changed = apply_overrides(tree, ["train.steps=7", "train.betas=[0.8, 0.9]", "data.source=a=b", "data.weights.x=2"])
    assert tree == {"train": {"steps": 5}}
    assert changed["train"] == {"steps": 7, "betas": [0.8, 0.9]}
    assert changed["data"] == {"source": "a=b", "weights": {"x": 2}}


@pytest.mark.parametrize("name", preset_names())
def test_presets_validate_and_survive_json(name: str) -> None:
    config = build_config(load_preset(name))
    assert build_config(config.model_dump(mode="json")) == config


def test_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[train]\nsteps = 3\n")
    bad.write_text("[train\n")
    assert load_file(good) == {"train": {"steps": 3}}
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_file(bad)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="nothing"):
        load_preset("nothing")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("model.hiden_dim", "model.hidden_dim"), ("trian.steps", "train"), ("train.top_k", "model.top_k"),
     ("model.router.bais", "model.router.bias")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"; did you mean '{nearest}'\\?$"):
        build_config({}, [f"{key}=1"])


def test_a_key_like_no_other_has_no_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'model\.xyzzy'$"):
        build_config({}, ["model.xyzzy=1"])


@pytest.mark.parametrize(
    "override",
    ["train.betas=[2,3]", f"train.seed={2**60}", "model.rope.theta=1", "train.threads=100000"],
)
def test_values_that_torch_would_refuse_are_refused_here(override: str) -> None:
    with pytest.raises(ConfigError):
        build_config({}, [override])


def test_a_mistake_of_the_whole_has_no_empty_key() -> None:
    balance = 'model.router.balance=[{kind="expert", weight=1}]'
    with pytest.raises(ConfigError, match=r"^config: the balance term"):
        build_config({}, [balance, "train.accumulate=2"])


def test_dates_in_a_file_are_no_numbers() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        build_config({"train": {"steps": datetime.date(2000, 1, 1)}})
