"""Cells as text, and models of equal cost: FLOPs and totals against counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moestro.compare.budget import MOST_STEPS, parse_budget
from moestro.compare.cells import (
    WIDTH_STEP,
    Cell,
    base_config,
    parse_cells,
    size_cell,
    split_outside,
    token_flops,
    training_cost,
)
from moestro.config import Config, load_preset, preset_names
from moestro.errors import ConfigError
from moestro.model.size import measure_size

SCHEMES = preset_names("presets/routers")
D, V, LAYERS = 128, 2048, 4  # of the shipped base
ATTENTION = D * 4 * 32 + D * (48 + 16) + 48 + 48 * 4 * (16 + 32) + 4 * 32 * D  # q, latent, its norm, keys and values, o
REST = LAYERS * (ATTENTION + 2 * D) + D + 2 * V * D  # two norms a block, the last norm, both embeddings


@pytest.fixture(scope="module")
def base() -> Config:
    return base_config(load_preset("compare"), [])


def sized(text: str, base: Config, expansion: int = 8) -> Config:
    (cell,) = parse_cells(text)
    return size_cell(cell, base, expansion).config


def test_cells_have_labels_schemes_and_overrides() -> None:
    text = 'dense, a b=switch ,switch:router.capacity.factor=1.25:top_k=2,x=./my.toml:balance=[{kind="z:,",weight=1}]'
    assert parse_cells(text) == (
        Cell("dense", "dense"),
        Cell("a b", "switch"),
        Cell(
            "switch:router.capacity.factor=1.25:top_k=2", "switch", ("router.capacity.factor=1.25", "top_k=2")
        ),
        Cell("x", "./my.toml", ('balance=[{kind="z:,",weight=1}]',)),
    )  # fmt: skip
    aux = 'aux=deepseek-v3:router.bias=none:router.balance=[{kind="expert",weight=0.001}]'
    (cell,) = parse_cells(aux)
    assert (cell.label, cell.scheme) == ("aux", "deepseek-v3")
    assert cell.overrides == ("router.bias=none", 'router.balance=[{kind="expert",weight=0.001}]')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a cell"),
        ("dense,,switch", "not a cell"),
        ("=dense", "not a cell"),
        ("a=", "not a cell"),
        ("dense,dense", "two cells are called 'dense'"),
        ("switch:top_k", "key=value"),
        ("switch:top_k=", "key=value"),
        ("switch::top_k=2", "key=value"),
        ("switch:router.balance=[{kind='z'", "ends before its }"),
        ("switch:router.balance=[}", "closes nothing"),
        ("x=switch:a='b", "ends before its '"),
    ],
)
def test_a_bad_cell_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        parse_cells(text)


def test_only_what_is_outside_brackets_and_quotes_splits() -> None:
    assert split_outside("a,(b,[c,d]),'e,f',g", ",") == ["a", "(b,[c,d])", "'e,f'", "g"]
    assert split_outside("", ",") == [""]


def test_slugs_are_plain_and_do_not_collide() -> None:
    cells = [Cell(label, "dense") for label in ("dense", "Dense", "a:b", "a-b", "../x", "é", "..", "a" * 99, "a" * 98)]
    slugs = [cell.slug for cell in cells]
    assert len({slug.lower() for slug in slugs}) == len(slugs) and slugs[0] == "dense" and slugs[3] == "a-b"
    assert all(slug.isascii() and "/" not in slug and not slug.startswith(".") and len(slug) < 80 for slug in slugs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_costs_what_the_base_costs(scheme: str, base: Config) -> None:
    config = sized(scheme, base)
    model = config.model
    active = model.top_k + model.num_shared_experts
    # widths are multiples of 4, so that half a step of all active experts in all layers is the best that can be had
    half_a_step = 2 * 3 * D * (WIDTH_STEP / 2) * active * LAYERS
    assert abs(token_flops(config) - token_flops(base)) <= half_a_step
    assert abs(token_flops(config) / token_flops(base) - 1) < 0.03 or active >= 16
    assert model.dense_dim == (model.expert_dim * active if model.num_experts else 512)
    assert model.expert_dim % WIDTH_STEP == 0 or not model.num_experts
    neighbours = [sized(f"{scheme}:expert_dim={model.expert_dim + step}", base) for step in (-4, 4)]
    if model.num_experts:
        best = abs(token_flops(config) - token_flops(base))
        assert all(abs(token_flops(other) - token_flops(base)) >= best for other in neighbours)


def test_the_dense_base_is_counted_by_hand(base: Config) -> None:
    matrices = REST - V * D + LAYERS * 3 * D * 512  # the input embedding is a look-up
    assert token_flops(base) == 2 * matrices + LAYERS * 4 * 2 * (16 + 16 + 32) * 128
    assert (
        measure_size(base.model).total == measure_size(sized("dense", base).model).total == REST + LAYERS * 3 * D * 512
    )


@pytest.mark.parametrize(("scheme", "experts", "shared"), [("switch", 8, 0), ("deepseek-moe", 63, 1)])
def test_totals_are_counted_by_hand(scheme: str, experts: int, shared: int, base: Config) -> None:
    model = sized(scheme, base).model
    assert (model.num_experts, model.num_shared_experts) == (experts, shared)
    ffn = 3 * D * model.expert_dim * (experts + shared) + D * experts + experts  # gates and the buffer of biases
    assert measure_size(model).total == REST + LAYERS * ffn


def test_numbers_of_experts_follow_from_the_scheme(base: Config) -> None:
    counts = {name: sized(name, base).model.num_experts for name in SCHEMES}
    assert counts["deepseek-v3"] == 64 and counts["deepseek-v2"] == 64  # 63 and 62, rounded up to 8 groups
    assert counts["glam"] == 8 * 2 * 2 and counts["st-moe"] == 8 * 4 * 2  # every other, every fourth block
    assert counts["deepseek-v4"] == 60  # 55, rounded up to a multiple of its 6 choices: it hashes
    assert counts["hash"] == 8 and counts["dense"] == 0
    assert sized("deepseek-moe:num_shared_experts=0:top_k=8", base).model.num_experts == 64
    assert sized("switch", base, expansion=3).model.num_experts == 3


def test_what_a_cell_sets_is_left_alone(base: Config, tmp_path: Path) -> None:
    fixed = sized("switch:num_experts=5:expert_dim=10:dense_dim=77", base).model
    assert (fixed.num_experts, fixed.expert_dim, fixed.dense_dim) == (5, 10, 77)
    (cell,) = parse_cells("switch:expert_dim=64")
    assert size_cell(cell, base, 8).flops_ratio < 0.6
    assert sized("dense:dense_dim=100", base).model.dense_dim == 100
    scheme = tmp_path / "mine.toml"
    scheme.write_text("[model]\ntop_k = 2\nnum_experts = 6\nnum_dense_layers = 1\nrouter = { bias = 'error' }\n")
    mine = sized(f"{scheme}:router.scale=1.5", base).model
    assert (mine.num_experts, mine.router.bias, mine.router.scale) == (6, "error", 1.5)
    assert sized("deepseek-v3:attention=mha:rope.factor=2", base).model.rope.factor == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "cell 'nothing': no preset 'nothing'; there are: deepseek-moe"),
        ("x=missing.toml", "cell 'x': cannot read config"),
        ("switch:num_expert=3", "unknown key 'model.num_expert'"),
        ("switch:top_k=many", "cell 'switch:top_k=many'.*top_k"),
        ("switch:top_k=9:num_experts=8", "top_k=9 exceeds"),
    ],
)
def test_a_model_that_cannot_be_is_named(text: str, message: str, base: Config) -> None:
    with pytest.raises(ConfigError, match=message):
        sized(text, base)


def test_a_scheme_holds_a_model_and_nothing_else(base: Config, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("[model]\ntop_k = 1\n[train]\nsteps = 3\n")
    with pytest.raises(ConfigError, match="nothing else"):
        sized(str(path), base)


def test_the_base_loses_its_routing_and_takes_no_new_one() -> None:
    base = base_config(load_preset("deepseek-v3"), ["model.dense_dim=100", "train.lr=0.5"])
    assert (base.model.num_experts, base.model.num_groups, base.model.dense_dim, base.train.lr) == (0, 1, 100, 0.5)
    for pair, word in (("model.top_k=2", "cell"), ("model.router.scale=1", "cell"), ("train.seed=1", "seeds")):
        with pytest.raises(ConfigError, match=word):
            base_config(load_preset("compare"), [pair])


def test_mtp_costs_training_flops_and_no_forward_flops(base: Config) -> None:
    plain, mtp = sized("switch", base), sized("switch:mtp_depth=1", base)
    assert token_flops(plain) == token_flops(mtp)
    model = mtp.model
    block = ATTENTION + 2 * D + 3 * D * model.expert_dim + D * 8 + 8 + 2 * D * D + 3 * D  # projection, three norms
    extra = 2 * (block + V * D) + 4 * 2 * (16 + 16 + 32) * 128
    assert training_cost(mtp) == training_cost(plain) + 3 * extra
    assert training_cost(plain) == 3 * token_flops(plain)


def test_budgets(base: Config) -> None:
    budget = parse_budget("1.5m", None, base)
    assert (budget.kind, budget.value, budget.text) == ("seconds", 90.0, "1.5m")
    assert budget.train_keys(base) == {"steps": MOST_STEPS, "minutes": 1.5, "keep_checkpoints": 1}
    assert parse_budget("2h", "seconds", base).value == 7200

    keys = parse_budget("2Mtok", "tokens", base).train_keys(base)
    assert keys["steps"] == round(2e6 / (8 * 256)) == 977 and keys["minutes"] == 0
    assert keys["eval_every"] == 123 and keys["checkpoint_every"] == 489  # ⌈977 / 8⌉, ⌈977 / 2⌉
    assert parse_budget("500ktok", None, base).value == 5e5 and parse_budget("2Btok", None, base).value == 2e9
    assert parse_budget("1tok", None, base).train_keys(base)["steps"] == 1


def test_equal_flops_give_costly_cells_fewer_steps(base: Config) -> None:
    budget = parse_budget("2Mtok", "flops", base)
    assert budget.kind == "flops" and budget.value == 2e6 * 3 * token_flops(base)
    assert budget.train_keys(base)["steps"] == 977
    mtp = sized("switch:mtp_depth=1", base)
    assert budget.train_keys(mtp)["steps"] == round(budget.value / training_cost(mtp) / 2048) < 800


@pytest.mark.parametrize(
    ("text", "equal", "message"),
    [
        ("10", None, "none of"),
        ("10 parsecs", None, "none of"),
        ("0m", None, "none of"),
        ("-5m", None, "none of"),
        ("20mtok", None, "none of"),
        ("2Mtok", "seconds", "budget of time"),
        ("10m", "tokens", "budget in tokens"),
        ("10m", "flops", "budget in tokens"),
        ("2Mtok", "joules", "none of tokens, seconds, flops"),
    ],
)
def test_a_budget_that_cannot_be_is_named(text: str, equal: str | None, message: str, base: Config) -> None:
    arguments: tuple[Any, ...] = (text, equal, base)
    with pytest.raises(ConfigError, match=message):
        parse_budget(*arguments)
