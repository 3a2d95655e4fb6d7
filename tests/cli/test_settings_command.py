"""`moestro settings` shows what the configuration takes, and docs/settings.md is what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, last_json

from moestro.config import Config, build_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def listed(call: Call) -> list[dict[str, Any]]:
    return last_json(call("settings", "--json"))["settings"]


def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of everything in a configuration that is no section."""
    found: set[str] = set()
    for key, value in tree.items():
        is_section = isinstance(value, dict) and prefix + key != "data.weights"
        found |= leaves(value, f"{prefix}{key}.") if is_section else {prefix + key}
    return found


def test_every_setting_is_listed_with_what_it_means(listed: list[dict[str, Any]]) -> None:
    names = [entry["name"] for entry in listed]
    assert {name for name in names if "[]" not in name} == leaves(Config().model_dump())
    assert [name for name in names if "[]" in name] == [
        f"model.router.balance[].{key}" for key in ("kind", "weight", "over")
    ]
    assert not [entry["name"] for entry in listed if not entry["meaning"] or not entry["values"]]


def test_what_is_shown_can_be_typed(call: Call, listed: list[dict[str, Any]]) -> None:
    shown = [line.split("  (")[0] for line in call("settings")[1].splitlines() if not line.startswith(" ")]
    assert len(shown) == len(listed)
    for pair in shown:
        if "[]" not in pair:
            assert build_config({}, [pair]) == Config(), pair


def test_choices_and_bounds_are_those_that_hold(listed: list[dict[str, Any]]) -> None:
    values = {entry["name"]: entry["values"] for entry in listed}
    assert values["model.attention"] == "mla, mha, gqa, mqa"
    assert values["model.rope_dim"] == "whole number ≥ 2, a multiple of 2"
    assert values["data.valid_fraction"] == "number > 0, < 0.5"
    assert values["train.recompute"] == "true, false"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("train.lr", ["train.lr"]),
        ("lr", ["train.lr"]),
        ("router.bias", ["model.router.bias"]),
        ("seq_len", ["train.seq_len"]),
        (
            "capacity",
            [f"model.router.capacity.{key}" for key in ("factor", "eval_factor", "unit", "order", "spared_fraction")],
        ),
    ],
)
def test_a_name_means_its_parts(call: Call, name: str, found: list[str]) -> None:
    assert [entry["name"] for entry in last_json(call("settings", name, "--json"))["settings"]] == found


def test_a_name_that_is_none_is_answered_with_the_nearest(call: Call) -> None:
    code, out, err = call("settings", "train.stesp")
    assert (code, out) == (2, "") and "did you mean 'train.steps'?" in err


def test_the_page_is_up_to_date(call: Call) -> None:
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    assert page == call("settings", "--markdown")[1], "moestro settings --markdown > docs/settings.md"
    assert json.dumps("model.num_experts") and "`model.num_experts` | `32` | experts" in page
