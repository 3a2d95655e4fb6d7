"""Every configuration of the project: frozen, strict, written as TOML, changed with `key=value`.

A `Config` has four sections: `model` (the architecture, flat; a preset is about twenty lines), `train`,
`data` and `fp8`. Unknown keys and impossible combinations are `ConfigError`s that name the key. Names are Moestro's
own (`num_` counts, `_dim` widths); Hugging Face names live in `checkpoints/hf.py` alone.

Values are read in this order: defaults < preset or file < `--depth` dial < `key=value` overrides.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moestro.errors import ConfigError
from moestro.scores import SCORES


class Frozen(BaseModel):
    """A frozen value object; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def setting(default: Any, unit: str, meaning: str, **bounds: Any) -> Any:
    """A field, with what `moestro settings` says of it; the unit of choices and of plain numbers is ""."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **bounds)


class RopeConfig(Frozen):
    """Rotary embedding, with YaRN (arXiv 2309.00071) when `factor` > 1."""

    theta: float = setting(10000.0, "", "base of the frequencies", gt=1)
    factor: float = setting(1.0, "", "> 1: YaRN stretches the context by this much", ge=1)
    original_max_seq_len: int = setting(4096, "tokens", "context length before YaRN", gt=0)
    beta_fast: float = setting(
        32.0, "turns", "YaRN keeps frequencies with more turns than this in the original context", gt=0
    )
    beta_slow: float = setting(1.0, "turns", "YaRN stretches frequencies with fewer turns than this", gt=0)
    mscale: float = setting(1.0, "", "YaRN: scale of the rotated values, relative to mscale_all_dim", ge=0)
    mscale_all_dim: float = setting(1.0, "", "YaRN: scale of attention scores; 0 for none", ge=0)


class BalanceTerm(Frozen):
    """One auxiliary loss on every router, added as weight · loss; the formulas are in `routing/balance.py`.

    `sequence` is DeepSeek-V3's, `expert` Switch's and DeepSeekMoE's, `first_choice` GShard's, `device` DeepSeekMoE's,
    `communication` DeepSeek-V2's, `importance` and `load` Shazeer's, `z` ST-MoE's. `over` says what the shares of
    `expert`, `device` and `communication` are counted on: every sequence, or all tokens of a forward pass.
    """

    kind: Literal["sequence", "expert", "first_choice", "device", "communication", "importance", "load", "z"] = Field(
        description="which loss"
    )
    weight: float = Field(ge=0, description="factor of the loss")
    over: Literal["batch", "sequence"] = setting("batch", "", "what expert, device and communication count shares on")

    @property
    def needs_whole_batch(self) -> bool:
        """Whether cutting a batch into micro-batches would change the loss."""
        return self.kind not in ("sequence", "z") and not (self.kind in SHARE_KINDS and self.over == "sequence")


SHARE_KINDS = ("expert", "device", "communication")


class CapacityConfig(Frozen):
    """How many choices an expert, or a device (a group of experts), accepts from one forward pass.

    The limit is factor · mean load; 0 means no limit. Choices beyond it are dropped: the residual carries the token.
    `position` keeps choices in batch order, first choices before second ones (GShard, Switch). `affinity` drops the
    lowest affinities first (DeepSeek-V2). Tokens of a random `spared_fraction` of the sequences are always accepted
    (V2: 0.1).
    """

    factor: float = setting(0.0, "mean loads", "most choices accepted in training; 0: no limit", ge=0)
    eval_factor: float = setting(0.0, "mean loads", "the same in evaluation and serving", ge=0)
    unit: Literal["expert", "device"] = setting(
        "expert", "", "what is limited: every expert, or every device (a group of experts)"
    )
    order: Literal["position", "affinity"] = setting(
        "position", "", "what is dropped first: what comes last (GShard, Switch), or the lowest affinities (V2)"
    )
    spared_fraction: float = setting(
        0.0, "fraction", "sequences, chosen at random, that lose nothing (V2: 0.1)", ge=0, le=1
    )


class RouterConfig(Frozen):
    """How tokens choose experts: a scheme is data, not a class. Presets in `presets/routers/`."""

    score: str = setting(
        "sigmoid", "", "an expert's score: sigmoid (V3), softmax, sqrt_softplus (V4), or constant (Hash layers)"
    )
    selection: Literal["top_k", "hash"] = setting("top_k", "", "the top_k by score, or by a hash of the token id")
    num_hash_layers: int = setting(0, "layers", "the first so many MoE layers always use the hash (V4)", ge=0)
    group_score: Literal["top2", "max"] = setting(
        "top2", "", "a group's score: the sum of its two best experts (V3), or its best (V2)"
    )
    normalize: bool = setting(True, "", "whether the weights of the chosen experts sum to scale")
    scale: float = setting(2.5, "", "factor of the routed experts' output", gt=0)
    noise: Literal["none", "learned", "jitter"] = setting(
        "none", "", "in training: learned is Shazeer's noisy top-k, from matrices that start at zero; jitter Switch's"
    )
    random_second: bool = setting(
        False, "", "in training, a choice after the first is kept with probability 2 · weight (GShard)"
    )
    bias: Literal["none", "sign", "error", "multiplicative"] = setting(
        "sign", "", "b += γ sign(e) (V3), b += γ e, or s · (1 + b) with the sign rule; e = 1 - load / mean load"
    )
    bias_speed: float = setting(0.001, "per step", "γ of the bias rule", ge=0)
    balance: tuple[BalanceTerm, ...] = setting(
        (BalanceTerm(kind="sequence", weight=1e-4),), "", "auxiliary losses: a list of {kind, weight, over}"
    )
    capacity: CapacityConfig = CapacityConfig()

    @model_validator(mode="after")
    def check_scheme(self) -> Self:
        """Refuse losses that the scheme cannot compute, and a constant score that would have to choose."""
        kinds = {term.kind for term in self.balance}
        if "load" in kinds and self.noise != "learned":
            raise ValueError("the balance term 'load' is an estimate over the noise: it needs noise='learned'")
        if self.score not in SCORES:
            raise ValueError(f"there is no score function '{self.score}'; there are: {', '.join(SCORES)}")
        is_learned = SCORES[self.score].is_learned
        if not is_learned and self.selection != "hash":
            raise ValueError(f"score='{self.score}' cannot choose experts: it needs selection='hash'")
        if not is_learned and kinds:
            raise ValueError(f"score='{self.score}' has no gradient: balance must be []")
        return self


class ModelConfig(Frozen):
    """The architecture. Widths in values, lengths in tokens.

    `num_experts = 0` is a dense Transformer; `q_lora_rank = 0` projects queries directly, as V2-Lite does.
    With `attention` other than `mla`, heads are `nope_dim + rope_dim` wide, the last `rope_dim` rotated.
    """

    vocab_size: int = setting(8192, "tokens", "size of the vocabulary; training sets it to the tokenizer's", gt=0)
    hidden_dim: int = setting(256, "values", "width of the residual stream", gt=0)
    num_layers: int = setting(6, "layers", "blocks, MTP modules not counted", gt=0)
    num_dense_layers: int = setting(1, "layers", "the first so many blocks have no experts", ge=0)
    dense_dim: int = setting(640, "values", "inner width of a feed-forward layer without experts", gt=0)
    max_seq_len: int = setting(4096, "tokens", "longest context", gt=0)
    attention: Literal["mla", "mha", "gqa", "mqa"] = setting(
        "mla", "", "mla: latent attention; mha, gqa, mqa: keys and values per head, per group, or shared"
    )
    num_heads: int = setting(4, "heads", "query heads", gt=0)
    num_kv_heads: int = setting(1, "heads", "heads of keys and values, for gqa only", gt=0)
    q_lora_rank: int = setting(0, "values", "width of the queries' latent; 0: projected directly, as in V2-Lite", ge=0)
    kv_lora_rank: int = setting(64, "values", "width of the cached latent", gt=0)
    nope_dim: int = setting(32, "values", "width of a head's part that is not rotated", ge=0)
    rope_dim: int = setting(32, "values", "width of a head's rotated part", ge=2, multiple_of=2)
    v_dim: int = setting(64, "values", "width of a head's values", gt=0)
    num_experts: int = setting(32, "experts", "routed experts of a layer; 0: a dense Transformer", ge=0)
    num_shared_experts: int = setting(1, "experts", "experts that every token uses", ge=0)
    top_k: int = setting(4, "experts", "routed experts of a token", gt=0)
    num_groups: int = setting(1, "groups", "groups that experts are divided into", gt=0)
    top_k_groups: int = setting(1, "groups", "groups whose experts a token may use", gt=0)
    expert_dim: int = setting(128, "values", "inner width of an expert", gt=0)
    moe_every: int = setting(1, "layers", "of the blocks after the dense ones, every so many has experts", gt=0)
    mtp_depth: int = setting(0, "modules", "multi-token prediction: tokens predicted beyond the next", ge=0)
    tie_embeddings: bool = setting(False, "", "whether the head is the embedding")
    norm_eps: float = setting(1e-6, "", "added to the mean square in RMSNorm", gt=0)
    init_std: float = setting(0.02, "", "standard deviation of the initial weights", gt=0)
    init_scale: float = setting(0.0, "", "> 0: σ = √(init_scale / inputs) instead of init_std (Switch: 0.1)", ge=0)
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
        hashed = self.router.selection == "hash" or self.router.num_hash_layers
        if hashed and self.num_experts % self.top_k:
            raise ValueError(
                f"hash routing needs num_experts={self.num_experts} to be a multiple of top_k={self.top_k}"
            )
        if self.top_k == self.num_experts and any(term.kind == "load" for term in self.router.balance):
            raise ValueError("the balance term 'load' needs top_k below num_experts")
        return self

    def is_moe(self, index: int) -> bool:
        """Whether block `index` has experts; MTP blocks follow the main ones, as blocks num_layers + k."""
        if index >= self.num_layers:
            return self.num_experts > 0
        past_dense = index - self.num_dense_layers
        return self.num_experts > 0 and past_dense >= 0 and past_dense % self.moe_every == 0

    @property
    def moe_layers(self) -> list[int]:
        """The main blocks with a router."""
        return [index for index in range(self.num_layers) if self.is_moe(index)]

    @property
    def num_moe_layers(self) -> int:
        """Blocks with a router, MTP blocks included."""
        return len(self.moe_layers) + (self.mtp_depth if self.num_experts else 0)


SLOWEST_BF16_BETA = 1 - 2**-8  # neighbours among bf16 values are up to 2⁻⁷ apart, so less than half of that is lost


class TrainConfig(Frozen):
    """The run: length, schedule, optimizer, precision, and what is written when."""

    start_from: str = setting("", "", "a run, checkpoint or model directory whose weights are trained on")
    ignore_config_keys: tuple[str, ...] = setting((), "", "keys of that directory's config.json to ignore")
    seed: int = setting(0, "", "decides initial weights, order of data and noise", gt=-(2**43), lt=2**43)
    steps: int = setting(1000, "steps", "length of the run", gt=0)
    minutes: float = setting(0.0, "minutes", "> 0: after 20 steps, steps is lowered to fit this time", ge=0)
    seq_len: int = setting(512, "tokens", "length of a row", gt=1)
    batch_size: int = setting(16, "rows", "rows per forward pass", gt=0)
    accumulate: int = setting(1, "passes", "forward passes per step", gt=0)
    optimizer: Literal["adamw", "muon"] = setting("adamw", "", "of matrices; muon leaves the rest to AdamW")
    moments: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "", "how the optimizer's averages are kept; auto: bf16 where precision is fp8, else fp32"
    )
    lr: float = setting(1e-3, "", "highest learning rate", gt=0)
    warmup_steps: int = setting(20, "steps", "the learning rate rises over so many", ge=0)
    decay_fraction: float = setting(
        0.3, "fraction", "last part of the run, over which the learning rate falls", ge=0, le=1
    )
    final_lr_ratio: float = setting(0.05, "fraction", "of lr, at the end", ge=0, le=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = setting(
        (0.9, 0.95), "", "AdamW: decay of the mean and of the mean square of gradients"
    )
    weight_decay: float = setting(0.1, "", "AdamW: decay of matrices, times the learning rate", ge=0)
    clip: float = setting(1.0, "", "largest norm of the gradient", gt=0)
    mtp_weight: float = setting(0.3, "", "weight of the MTP loss", ge=0)
    mtp_weight_late: float = setting(0.1, "", "the same after two thirds of the run, as in V3", ge=0)
    bias_frozen_fraction: float = setting(
        0.034, "fraction", "last part of the run, without updates of the routers' biases", ge=0, le=1
    )
    precision: Literal["auto", "bf16", "fp32", "fp8"] = setting(
        "auto", "", "of products; auto: bf16 where it is measured faster than fp32"
    )
    recompute: bool = setting(False, "", "compute blocks again in the backward pass: slower, less memory")
    mask_documents: bool = setting(True, "", "no token attends to another document of its row")
    checkpoint_every: int = setting(200, "steps", "between checkpoints", gt=0)
    keep_checkpoints: int = setting(2, "checkpoints", "newest ones to keep", gt=0)
    save_dtype: Literal["fp32", "bf16", "fp8"] = setting("fp32", "", "of checkpoints; resumes stay exact")
    eval_every: int = setting(100, "steps", "between evaluations", gt=0)
    eval_tokens: int = setting(65536, "tokens", "held-out text of a domain that is evaluated while training", gt=0)
    threads: int = setting(0, "threads", "set by commands; 0: every core they may use", ge=0, le=1024)
    mirror: Literal["none", "tensorboard", "trackio"] = setting("none", "", "a tracker that gets the metrics too")

    @model_validator(mode="before")
    @classmethod
    def read_old_name(cls, tree: Any) -> Any:
        """`precision` was once called `dtype`."""
        if not isinstance(tree, dict) or "dtype" not in tree:
            return tree
        if "precision" in tree:
            raise ValueError("dtype is the old name of precision: give one of them")
        return {("precision" if key == "dtype" else key): value for key, value in tree.items()}

    @property
    def moments_are_bf16(self) -> bool:
        """Whether the optimizers keep their moments in bf16."""
        return self.moments == "bf16" or (self.moments == "auto" and self.precision == "fp8")

    @model_validator(mode="after")
    def check_moments(self) -> Self:
        """Refuse averages so slow that bf16 rounds their decay away: a moment would never shrink again."""
        if self.moments_are_bf16 and max(self.betas) > SLOWEST_BF16_BETA:
            raise ValueError(
                f"moments in bf16 need betas of at most {SLOWEST_BF16_BETA}, not {list(self.betas)}: beyond that, "
                "rounding undoes the decay (set train.moments=fp32)"
            )
        return self


class Fp8Config(Frozen):
    """How `train.precision=fp8` quantises and multiplies; the defaults are DeepSeek-V3's (docs/fp8-training.md)."""

    scale: Literal["fp32", "ue8m0"] = setting("fp32", "", "of a block: fp32, or ue8m0, the next power of two (V3.1)")
    transpose: Literal["requantize", "both"] = setting(
        "requantize", "", "for gradients of weights: codes requantized along tokens (V3), or both ways from the tensor"
    )
    accumulate: Literal["fp32", "hopper"] = setting(
        "fp32", "", "sums of products: fp32, or hopper, the 14 bits of H100 tensor cores"
    )
    promote: int = setting(
        128, "products", "hopper: after so many, a sum is added to one in fp32", gt=0, multiple_of=32
    )
    tile: Literal["block", "tensor"] = setting("block", "", "a scale per block (V3), or one per tensor")
    dgrad_tile: Literal["row", "square"] = setting(
        "row", "", "gradients of activations in rows of 128 (V3), or in squares of 128 x 128"
    )

    @model_validator(mode="after")
    def check_promotion(self) -> Self:
        """Refuse sums that would run over several scales."""
        if self.promote > 128 and self.tile == "block":
            raise ValueError(f"promote={self.promote} exceeds the 128 values that share a scale: set tile='tensor'")
        return self


class DataConfig(Frozen):
    """Where text comes from. `weights` sets each domain's share of the tokens. Domains not named divide the rest by
    size, 0 leaves a domain out, and if all are named only the proportions count."""

    source: str = setting("builtin", "", "a file, a folder, a Hugging Face data set, or builtin")
    tokenizer: str = setting("auto", "", "auto, builtin, train, or a tokenizer.json")
    weights: dict[str, float] = setting(
        {}, "shares", "of the tokens, by domain; those not named divide the rest by size, 0 leaves one out"
    )
    valid_fraction: float = setting(0.02, "fraction", "documents that are held out", gt=0, lt=0.5)
    encoding: str = setting("", "", "of files that are not UTF-8, such as cp1252; empty: guessed, with a notice")
    text_field: str = setting("", "", "the field of a record that is its text; empty: text, content, or a conversation")

    @field_validator("encoding")
    @classmethod
    def check_encoding(cls, name: str) -> str:
        """Refuse what Python does not know as an encoding of text."""
        try:
            if name:
                "".encode(name)
        except (LookupError, ValueError):
            raise ValueError("is no encoding of text; there are cp1252, cp949, gb18030, shift_jis and more") from None
        return name

    @model_validator(mode="after")
    def check_weights(self) -> Self:
        """Weights are shares, never negative; 0 leaves a domain out."""
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError("data.weights must not be negative")
        return self


class Config(Frozen):
    """One run: model, training, data, and what FP8 means in it."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    fp8: Fp8Config = Fp8Config()

    @model_validator(mode="after")
    def check_accumulation(self) -> Self:
        """Refuse accumulation under losses over a whole batch: its parts do not sum to them."""
        cut = [term.kind for term in self.model.router.balance if term.needs_whole_batch]
        if cut and self.train.accumulate > 1 and self.model.num_experts:
            raise ValueError(
                f"the balance term '{cut[0]}' is over the whole batch, which train.accumulate="
                f"{self.train.accumulate} would cut: set train.accumulate=1, or over='sequence' where it applies"
            )
        return self


SETTINGS = "settings.json"  # a run directory's resolved configuration; config.json would make it look like a model


def preset_names(folder: str = "presets") -> list[str]:
    """Names that `load_preset` takes; router schemes are in `presets/routers`."""
    entries = (resources.files("moestro") / folder).iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in entries if entry.name.endswith(".toml"))


def load_preset(name: str, folder: str = "presets") -> dict[str, Any]:
    """The raw tree of a shipped preset; raises `ConfigError` for an unknown name."""
    if name not in preset_names(folder):
        raise ConfigError(f"no preset '{name}'; there are: {', '.join(preset_names(folder))}")
    return tomllib.loads((resources.files("moestro") / folder / f"{name}.toml").read_text("utf-8"))


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
    """Set `section.key=value` pairs in a copy of `tree`; a value that is not TOML is a plain string."""
    result: dict[str, Any] = copy.deepcopy(dict(tree))
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


def quote_value(text: str) -> str:
    """A string as the value of an override, whatever is in it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


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


def suggest_key(key: str) -> str:
    """A question that names the nearest key: the same name in another section, else a similar spelling."""
    known = list(_list_keys(Config().model_dump()))
    leaf = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    nearest = same or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def _list_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _list_keys(value, f"{prefix}{key}.")


def _describe(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'" + suggest_key(key))
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            problems.append((f"{key}: " if key else "") + message + given)
    return "config: " + "; ".join(problems)
