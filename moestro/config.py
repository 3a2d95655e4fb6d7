"""Every configuration of the project: frozen, strict, written as TOML, changed with `key=value`.

Three sections make one `Config`: `model` (the architecture, flat, one preset is some twenty lines), `train`
and `data`. Unknown keys and impossible combinations are `ConfigError`s that name the key. Names are Moestro's
own (`num_` counts, `_dim` widths); Hugging Face names live in `model/hf.py` alone.

Reading order of values: defaults < preset or file < `--depth` dial < `key=value` overrides.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moestro.errors import ConfigError


class Frozen(BaseModel):
    """A frozen value object; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RopeConfig(Frozen):
    """Rotary embedding, with YaRN (arXiv 2309.00071) when `factor` > 1."""

    theta: float = Field(10000.0, gt=0)
    factor: float = Field(1.0, ge=1)
    original_max_seq_len: int = Field(4096, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float = Field(1.0, ge=0)
    mscale_all_dim: float = Field(1.0, ge=0)


class BalanceTerm(Frozen):
    """One auxiliary balance loss: `sequence` is DeepSeek-V3's complementary loss (V3 eq. 17–20)."""

    kind: Literal["sequence"]
    weight: float = Field(ge=0)


class RouterConfig(Frozen):
    """How tokens choose experts: a scheme is data, not a class (V3 eq. 12–16; V2 §2.2)."""

    score: Literal["sigmoid", "softmax"] = "sigmoid"
    group_score: Literal["top2", "max"] = "top2"
    normalize: bool = True
    scale: float = Field(2.5, gt=0)
    bias: Literal["sign", "none"] = "sign"
    bias_speed: float = Field(0.001, ge=0)
    balance: tuple[BalanceTerm, ...] = (BalanceTerm(kind="sequence", weight=1e-4),)


class ModelConfig(Frozen):
    """The architecture. Widths in values, lengths in tokens.

    `num_experts = 0` is a dense Transformer; `q_lora_rank = 0` projects queries directly, as V2-Lite does.
    With `attention` other than `mla`, heads are `nope_dim + rope_dim` wide, the last `rope_dim` rotated.
    """

    vocab_size: int = Field(8192, gt=0)
    hidden_dim: int = Field(256, gt=0)
    num_layers: int = Field(6, gt=0)
    num_dense_layers: int = Field(1, ge=0)
    dense_dim: int = Field(640, gt=0)
    max_seq_len: int = Field(4096, gt=0)
    attention: Literal["mla", "mha", "gqa", "mqa"] = "mla"
    num_heads: int = Field(4, gt=0)
    num_kv_heads: int = Field(1, gt=0, description="for gqa only")
    q_lora_rank: int = Field(0, ge=0)
    kv_lora_rank: int = Field(64, gt=0)
    nope_dim: int = Field(32, ge=0)
    rope_dim: int = Field(32, ge=2, multiple_of=2)
    v_dim: int = Field(64, gt=0)
    num_experts: int = Field(32, ge=0)
    num_shared_experts: int = Field(1, ge=0)
    top_k: int = Field(4, gt=0)
    num_groups: int = Field(1, gt=0)
    top_k_groups: int = Field(1, gt=0)
    expert_dim: int = Field(128, gt=0)
    mtp_depth: int = Field(0, ge=0)
    tie_embeddings: bool = False
    norm_eps: float = Field(1e-6, gt=0)
    init_std: float = Field(0.02, gt=0)
    rope: RopeConfig = RopeConfig()
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def check_shapes(self) -> Self:
        """Refuse combinations that no router or attention can run."""
        if self.num_dense_layers > self.num_layers:
            raise ValueError(f"num_dense_layers={self.num_dense_layers} exceeds num_layers={self.num_layers}")
        if self.attention == "gqa" and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.num_experts == 0:
            return self
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts={self.num_experts} is not a multiple of num_groups={self.num_groups}")
        if self.top_k_groups > self.num_groups:
            raise ValueError(f"top_k_groups={self.top_k_groups} exceeds num_groups={self.num_groups}")
        group_dim = self.num_experts // self.num_groups
        if self.top_k > self.top_k_groups * group_dim:
            raise ValueError(f"top_k={self.top_k} exceeds the {self.top_k_groups * group_dim} experts in reach")
        if self.router.group_score == "top2" and self.num_groups > 1 and group_dim < 2:
            raise ValueError("group_score='top2' needs groups of at least two experts")
        return self

    @property
    def num_moe_layers(self) -> int:
        """Blocks with a router, MTP blocks included."""
        return (self.num_layers - self.num_dense_layers + self.mtp_depth) if self.num_experts else 0


class TrainConfig(Frozen):
    """The run: length, schedule, optimizer, precision, what is written when."""

    seed: int = 0
    steps: int = Field(1000, gt=0)
    minutes: float = Field(0.0, ge=0, description="> 0: after 20 steps, `steps` is lowered to fit this time")
    seq_len: int = Field(512, gt=1)
    batch_size: int = Field(16, gt=0, description="sequences per forward pass")
    accumulate: int = Field(1, gt=0, description="forward passes per step")
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1)
    final_lr_ratio: float = Field(0.05, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)
    mtp_weight: float = Field(0.3, ge=0)
    mtp_weight_late: float = Field(0.1, ge=0, description="V3 lowers the weight after two thirds of the run")
    bias_frozen_fraction: float = Field(0.034, ge=0, le=1, description="last part of the run without bias updates")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where it is measured faster")
    recompute: bool = False
    mask_documents: bool = True
    checkpoint_every: int = Field(200, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    eval_every: int = Field(100, gt=0)
    eval_tokens: int = Field(65536, gt=0, description="validation tokens per domain while training")
    threads: int = Field(0, ge=0, description="0: every core this process may use")
    mirror: Literal["none", "tensorboard", "trackio"] = "none"


class DataConfig(Frozen):
    """Where text comes from. `weights` gives domains their share of the tokens: domains that are not named divide the
    rest by size, 0 leaves one out, and where all are named only proportions count."""

    source: str = "builtin"
    tokenizer: str = Field("auto", description="auto, builtin, train, or a tokenizer.json")
    weights: dict[str, float] = {}
    valid_fraction: float = Field(0.02, gt=0, lt=0.5)

    @model_validator(mode="after")
    def check_weights(self) -> Self:
        """Weights are positive shares; a domain is left out with 0."""
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError("data.weights must not be negative")
        return self


class Config(Frozen):
    """One run: model, training, data."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()


SETTINGS = "settings.json"  # a run directory's resolved configuration; config.json would make it look like a model


def preset_names() -> list[str]:
    """Names that `load_preset` takes."""
    folder = resources.files("moestro") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """The raw tree of a shipped preset; raises `ConfigError` for an unknown name."""
    if name not in preset_names():
        raise ConfigError(f"no preset '{name}'; there are: {', '.join(preset_names())}")
    return tomllib.loads((resources.files("moestro") / "presets" / f"{name}.toml").read_text("utf-8"))


def load_file(path: Path) -> dict[str, Any]:
    """The raw tree of a TOML (or JSON) config file."""
    try:
        text = path.read_text("utf-8")
        tree: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {path.suffix.lstrip('.') or 'TOML'}: {error}") from error
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `section.key=value` pairs in a copy of `tree`; values are read as TOML, else as plain strings."""
    result: dict[str, Any] = json.loads(json.dumps(tree))
    for pair in overrides:
        key, separator, text = pair.partition("=")
        *path, leaf = key.strip().split(".")
        if not separator or not leaf or not path:
            raise ConfigError(f"'{pair}' is not of the form section.key=value, such as train.steps=40")
        node = result
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"'{key}': {part} is a value, not a section")
        node[leaf] = _parse_value(text.strip())
    return result


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build_config(tree: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Validate a raw tree with overrides; raises `ConfigError` naming every bad key in one line."""
    try:
        return Config.model_validate(apply_overrides(tree, overrides))
    except ValidationError as error:
        raise ConfigError(_describe(error)) from error


def _describe(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(
                f"{key}: {message} (got {item['input']!r})"
                if not isinstance(item["input"], dict)
                else f"{key}: {message}"
            )
    return "config: " + "; ".join(problems)
