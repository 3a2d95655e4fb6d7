"""`moestro ablate` as a user calls it: JSON, the table, one clear line for mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Result, last_json

from moestro.config import Config


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of two domains."""
    path = tmp_path_factory.mktemp("domains") / "both.jsonl"
    words = {"animals": "the cat sat on the dog ", "numbers": "12 345 été 12 moon "}
    records = ({"text": words[name] * count, "domain": name} for name in words for count in range(2, 9))
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def quiet_json(result: Result) -> dict[str, Any]:
    """The JSON of a command that had nothing to say beside it."""
    assert result[2] == ""
    return last_json(result)


def test_json_of_all_ablations(call: Call, tiny_run: Path, two_domains: Path) -> None:
    tree = quiet_json(call("ablate", tiny_run, "--data", two_domains, "--seeds", 2, "--json"))
    rows = {row["name"]: row for row in tree["ablations"]}
    controlled = ["domain:animals", "domain:numbers", "control"]
    assert list(rows) == ["top1", "fraction:0.25", "shared", "shared+1", *controlled]
    for row in rows.values():
        assert row["difference"] == pytest.approx(row["bits_per_byte"] - tree["intact"]["bits_per_byte"])
        assert list(row["domains"]) == ["animals", "numbers"] == list(tree["intact"]["domains"])
        assert row["masked"]
    assert {name: row["draws"] for name, row in rows.items() if row["draws"] > 1} == {"fraction:0.25": 2, "control": 2}
    evaluated = quiet_json(call("eval", tiny_run, "--data", two_domains, "--json"))
    assert (tree["tokens"], tree["intact"]["bits_per_byte"]) == (evaluated["tokens"], evaluated["bits_per_byte"])


def test_held_out_text_of_one_domain(call: Call, tiny_run: Path) -> None:
    code, out, err = call("ablate", tiny_run, "--seeds", 1)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.strip()]
    names = ["intact", "top1", "fraction:0.25", "shared", "shared+1"]
    assert [row[0] for row in rows if row[0] in names] == names
    assert all(len(row) == 3 and row[1] == row[2] for row in rows if row[0] in names)
    assert "+ is worse" in out and "not where its knowledge lies" in out
    assert err.startswith("left out: domains: the text has one domain") and err.count("\n") == 1


def test_the_table_shows_all_columns_wherever_it_goes(call: Call, tiny_run: Path, two_domains: Path) -> None:
    code, out, err = call("ablate", tiny_run, "--data", two_domains, "--what", "top1, domains", "--max-tokens", 30)
    assert (code, err) == (0, "")
    table = [line.split() for line in out.splitlines()]
    assert ["ablation", "all", "animals", "numbers"] in table
    (control,) = (line for line in table if line and line[0] == "control")
    assert len(control) == 5 and control[2].startswith("±")
    assert any(line[:1] == ["domain:animals:"] for line in table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--what", "top1,nothing"), "no ablation 'nothing'; there are: top1"),
        (("--what", "fraction:0.95"), "leaves a token as few as 0 experts"),
        (("--what", "domains"), "one domain"),
        (("--what", "domain:latin"), "no domain 'latin'"),
        (("--what", ","), "at least one"),
        (("--seeds", "0"), "random draws"),
        (("--experts-per-layer", "99"), "1 to 8"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--data", "/nowhere"), "/nowhere"),
        (("--dtype", "fp4"), "dtype"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(call: Call, tiny_run: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call("ablate", tiny_run, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("moestro: ") and err.count("\n") == 1 and message in err


def test_a_dense_model_has_nothing_to_mask(call: Call, make_config: Callable[..., Config], tmp_path: Path) -> None:
    from moestro.training.loop import train

    train(make_config("model.num_experts=0", "train.steps=2"), tmp_path / "dense", quiet=True)
    code, out, err = call("ablate", tmp_path / "dense")
    assert (code, out) == (2, "") and "dense model" in err and err.count("\n") == 1
