"""Cells of a comparison: what was asked for as text, and the model that costs as much as the others.

A cell is a router scheme with changes, `[label=]scheme[:key=value…]`. Its widths follow from the base alone. With A
routed and S shared experts per token, every expert is F wide and every dense layer F · (A + S), so F decides the
FLOPs of a token, and the number of experts decides the total. F is chosen so that a token costs as much as in the
base as a dense model; the total is `expansion` times the active experts. Values that a cell or scheme sets are kept.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.config import Config, ModelConfig, apply_overrides, build_config, load_file, load_preset
from moestro.errors import ConfigError
from moestro.model.size import attention_flops, forward_flops, measure_size, training_flops

SCHEMES = "presets/routers"
WIDTH_STEP = 4  # expert widths are multiples of this
SIZED = frozenset({"num_experts", "expert_dim", "dense_dim"})
# what a scheme decides; the base has no say in it
ROUTING = frozenset(
    {"num_experts", "num_shared_experts", "top_k", "num_groups", "top_k_groups", "expert_dim", "moe_every"}
    | {"num_dense_layers", "router"}
)
OPEN, CLOSE, QUOTES = "([{", ")]}", "\"'"
FORM = "[label=]scheme[:key=value…], such as switch or no-shared=deepseek-moe:num_shared_experts=0:top_k=8"


@dataclass(frozen=True)
class Cell:
    """One column of the comparison as it was written: a scheme and overrides `key=value` of its model."""

    label: str
    scheme: str
    overrides: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The label as a directory name; if characters had to be replaced, a digest makes it unique."""
        plain = re.sub(r"[^a-z0-9._-]+", "-", self.label.lower()).strip("-.")[:60]
        if plain == self.label:
            return plain
        return f"{plain}-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}".lstrip("-")


@dataclass(frozen=True)
class SizedCell:
    """A cell with its model; `flops_ratio` is the forward FLOPs of a token over those of the dense base."""

    cell: Cell
    config: Config
    flops_ratio: float


def parse_cells(text: str) -> tuple[Cell, ...]:
    """The cells of a comma-separated list. Commas and colons inside brackets or quotes do not split.

    Raises `ConfigError` for an empty cell, an override without `=`, open brackets and labels that occur twice.
    """
    cells = tuple(_parse_cell(part.strip()) for part in split_outside(text, ","))
    labels = [cell.label for cell in cells]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"two cells are called '{twice[0]}'; give one a label, as in other={twice[0]}")
    return cells


def _parse_cell(text: str) -> Cell:
    head, equals, rest = text.partition("=")
    labelled = bool(equals) and ":" not in head
    scheme, *overrides = (part.strip() for part in split_outside(rest if labelled else text, ":"))
    label = head.strip() if labelled else text
    if not label or not scheme:
        raise ConfigError(f"'{text}' is not a cell; cells are {FORM}")
    for pair in overrides:
        key, separator, value = pair.partition("=")
        if not (key.strip() and separator and value.strip()):
            raise ConfigError(f"cell '{label}': '{pair}' is not of the form key=value, such as router.bias=none")
    return Cell(label, scheme, tuple(overrides))


def split_outside(text: str, separator: str) -> list[str]:
    """`text` cut at every separator outside brackets and quotes; ConfigError if one stays open."""
    parts, expected, quote = [""], [], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        elif character in OPEN:
            expected.append(CLOSE[OPEN.index(character)])
        elif character in CLOSE and (not expected or expected.pop() != character):
            raise ConfigError(f"'{text}': '{character}' closes nothing")
        elif character == separator and not expected:
            parts.append("")
            continue
        parts[-1] += character
    if quote or expected:
        raise ConfigError(f"'{text}' ends before its {quote or expected[-1]}")
    return parts


def load_scheme(name: str) -> dict[str, Any]:
    """The `[model]` table of a shipped scheme, or of the .toml file at the path `name`."""
    tree = load_file(Path(name)) if name.endswith(".toml") else load_preset(name, SCHEMES)
    if set(tree) != {"model"}:
        raise ConfigError(f"the scheme {name} must hold [model] and nothing else, not {', '.join(tree) or 'nothing'}")
    model: dict[str, Any] = tree["model"]
    return model


def base_config(tree: Mapping[str, Any], overrides: Iterable[str]) -> Config:
    """The base as a dense model: a preset's tree without its routing, changed by `overrides` for all cells.

    Raises `ConfigError` for settings that cells, the number of seeds or the budget decide.
    """
    pairs = list(overrides)
    for pair in pairs:
        key = pair.partition("=")[0].strip()
        section, _, name = key.partition(".")
        if section == "model" and name.partition(".")[0] in ROUTING:
            raise ConfigError(f"{key} belongs to a cell", hint=f"give it there, as in --routers switch:{name}=…")
        if key in ("train.seed", "train.steps", "train.minutes"):
            decided_by = "seeds" if name == "seed" else "budget"
            raise ConfigError(f"{key} follows from the {decided_by}", hint=f"give --{decided_by} instead")
    model = {key: value for key, value in tree.get("model", {}).items() if key not in ROUTING}
    return build_config({**tree, "model": model | {"num_experts": 0}}, pairs)


def size_cell(cell: Cell, base: Config, expansion: int) -> SizedCell:
    """The cell's model at the cost of `base` (dense), with `expansion` times the parameters of its active experts.

    Raises `ConfigError`, with the cell's label, for an unknown scheme and for an impossible model.
    """
    shared = {key: value for key, value in base.model.model_dump(mode="json").items() if key not in ROUTING}
    try:
        scheme = load_scheme(cell.scheme)
        pairs = [f"model.{pair}" for pair in cell.overrides]
        tree = apply_overrides(base.model_dump(mode="json") | {"model": shared | scheme}, pairs)
        explicit = SIZED & (set(scheme) | {pair.partition("=")[0].strip() for pair in cell.overrides})
        config = _solve(tree, explicit, base, expansion)
    except ConfigError as error:
        raise ConfigError(f"cell '{cell.label}': {error}") from error
    return SizedCell(cell, config, token_flops(config) / token_flops(base))


def token_flops(config: Config) -> int:
    """Forward FLOPs of a token at the mean context of a training sequence."""
    return forward_flops(config.model, config.train.seq_len // 2)


def training_cost(config: Config) -> int:
    """FLOPs per trained token: the main model and, unlike `training_flops`, its MTP modules with their heads."""
    model, depth = config.model, config.model.mtp_depth
    matrices = measure_size(model).mtp_active + depth * model.hidden_dim * model.vocab_size
    scores = attention_flops(model.model_copy(update={"num_layers": depth}), config.train.seq_len // 2)
    return training_flops(model, config.train.seq_len) + 3 * (2 * matrices + scores)


def count_experts(model: ModelConfig, expansion: int) -> int:
    """The number of routed experts that makes all experts together `expansion` times those a token meets.

    If only every `moe_every`-th block has experts, it has that many times more. Rounded up so that groups, and the
    parts that hash routing cuts experts into, divide it.
    """
    count = expansion * model.moe_every * (model.top_k + model.num_shared_experts) - model.num_shared_experts
    hashed = model.router.selection == "hash" or model.router.num_hash_layers
    multiple = math.lcm(model.num_groups, model.top_k if hashed else 1)
    return math.ceil(count / multiple) * multiple


def _solve(tree: dict[str, Any], explicit: frozenset[str], base: Config, expansion: int) -> Config:
    """`tree` with the missing sizes filled in, at the base's FLOPs."""
    model: dict[str, Any] = tree["model"]
    # checked as a dense model first: the scheme's figures are then numbers, and need no number of experts yet
    plain = build_config(tree | {"model": model | {"num_experts": 0}}).model
    active = plain.top_k + plain.num_shared_experts
    sizes = {"num_experts": count_experts(plain, expansion)}

    def of_width(width: int) -> Config:
        free = sizes | {"expert_dim": width, "dense_dim": width * active}
        return build_config(tree | {"model": model | {key: free[key] for key in free if key not in explicit}})

    if "expert_dim" in explicit:
        return of_width(plain.expert_dim)
    target = token_flops(base)
    first, second = (token_flops(of_width(steps * WIDTH_STEP)) for steps in (1, 2))
    if first == second:
        return of_width(WIDTH_STEP)
    nearest = round((target - first) / (second - first)) + 1  # FLOPs are linear in the width
    steps = {max(1, nearest + offset) for offset in (-1, 0, 1)}
    return min((of_width(step * WIDTH_STEP) for step in sorted(steps)), key=lambda c: abs(token_flops(c) - target))
