"""Reading config.json of Hugging Face strictly: every key is used, checked, known to change nothing, or refused.

`null` means what transformers takes it to mean, or is refused; it never stands for a default that transformers would
not use. All facts about model types and keys are in `families.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moestro.checkpoints.families import (
    ALIASES,
    DIFFERENT,
    FAMILIES,
    INERT,
    MOE_KEYS,
    PLAIN_KEYS,
    RANGES,
    REQUIRED,
    WITH_TEXT_PART,
    Family,
    is_note,
)
from moestro.checkpoints.quantized import read_scheme
from moestro.config import ModelConfig, build_config
from moestro.errors import CheckpointError

LAYER_LISTS = {"moe_layer_freq": (0, 1), "mlp_layer_types": ("dense", "sparse")}  # what they say of a layer
SPECIAL = {"rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "layer_types", *LAYER_LISTS}
ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim",
}  # fmt: skip
ROPE_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,), "truncate": (True, None), "partial_rotary_factor": (1.0, None),
}  # fmt: skip
LARGEST_NUMBER = 1e12


@dataclass(frozen=True)
class HfConfig:
    """What a config.json says. `tree` is the text model's part of it, without ignored keys; `notices` say what was
    ignored."""

    model: ModelConfig
    tree: dict[str, Any]
    notices: tuple[str, ...] = ()


def hf_to_config(tree: Mapping[str, Any], ignored: Collection[str] = ()) -> ModelConfig:
    """ModelConfig of a config.json, from it alone; see `read_hf_config`."""
    read_scheme(text_part(tree))  # refuses what `ModelFiles` could not read
    return read_hf_config(tree, ignored).model


def read_hf_config(tree: Mapping[str, Any], ignored: Collection[str] = ()) -> HfConfig:
    """Read a config.json; keys that are in `ignored` are treated as absent.

    CheckpointError names a key that cannot be honoured, or says what sets another model type apart.
    """
    whole = text_part(tree)
    text = {key: value for key, value in whole.items() if key not in ignored}
    notices = [f"config.json: ignored as asked: {names(whole.keys() - text.keys())}"] if len(text) < len(whole) else []
    model_type = text.get("model_type")
    if model_type == "moestro" and isinstance(text.get("moestro"), dict):
        return HfConfig(build_config({"model": text["moestro"]}).model, text, tuple(notices))
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(f"config.json has {describe_type(model_type)}")
    if whole is not tree:
        notices.append(f"config.json: {tree['model_type']} also reads images; here it reads text alone")
    sizes = resolve_aliases(text)
    noted = check_keys(sizes, family)
    if noted:
        notices.append(f"config.json: these keys of other tools change nothing and are ignored: {names(noted)}")
    return HfConfig(build_config({"model": read_model(sizes, family)}).model, text, tuple(notices))


def correct_tree(tree: Mapping[str, Any], read: ModelConfig, actual: ModelConfig) -> dict[str, Any]:
    """The tree of a config.json that was read as one configuration, so that it is read as another."""
    changed = {
        theirs: getattr(actual, ours)
        for ours, theirs in PLAIN_KEYS.items()
        if getattr(actual, ours) != getattr(read, ours)
    }
    if tree.get("model_type") == "moestro":
        return dict(tree) | {"moestro": actual.model_dump(mode="json")}
    return {key: value for key, value in tree.items() if ALIASES.get(key) not in changed} | changed


def text_part(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the model of text: all of it, unless the model also reads images."""
    if tree.get("model_type") not in WITH_TEXT_PART:
        return tree
    text = tree.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(
            f"config.json of a {tree['model_type']} has no text_config with the sizes of its text part"
        )
    shared = {key: tree[key] for key in ("quantization_config", "bos_token_id", "eos_token_id", "pad_token_id",
                                         "torch_dtype", "dtype") if key in tree}  # fmt: skip
    return {"model_type": "deepseek_v3", **shared, **text}


def describe_type(model_type: Any) -> str:
    """A model type that is not read, with what sets it apart."""
    if isinstance(model_type, str) and model_type in DIFFERENT:
        return f"model_type '{model_type}', which is no DeepSeek-V2 or V3 by another name: {DIFFERENT[model_type]}"
    supported = ", ".join([*FAMILIES, *WITH_TEXT_PART])
    named = "no model_type" if model_type is None else f"model_type {show(model_type)}"
    return f"{named}; supported are {supported}"


def resolve_aliases(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with every key under the name that `families` uses."""
    resolved = {key: value for key, value in tree.items() if key not in ALIASES}
    for alias, key in ALIASES.items():
        if alias in tree and resolved.setdefault(key, tree[alias]) != tree[alias]:
            raise CheckpointError(f"config.json has {key}={show(resolved[key])}, but {alias}={show(tree[alias])}")
    return resolved


def check_keys(tree: Mapping[str, Any], family: Family) -> list[str]:
    """Refuse values that are not supported and keys that might change the function; returns other tools' keys."""
    missing = [key for key in REQUIRED if tree.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")
    for key, allowed in family.fixed.items():
        if key in tree and not is_one_of(tree[key], allowed):
            raise CheckpointError(f"config.json has {key}={show(tree[key])}; supported is {show(allowed[0])}")
    known = family.defaults.keys() | family.fixed.keys() | SPECIAL | INERT
    if family.defaults.keys().isdisjoint(MOE_KEYS):
        known -= {"moe_layer_freq", "mlp_layer_types"}
    unknown = {key: value for key, value in tree.items() if key not in known}
    refused = sorted(key for key, value in unknown.items() if not is_note(key, value))
    if refused:
        raise CheckpointError(
            f"config.json has keys that nothing here knows, and that might change what the model computes: "
            f"{names(refused)}",
            hint="if they change nothing, ignore them by name (--ignore-config-keys)",
        )
    return sorted(unknown)


def read_model(tree: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The keys of ModelConfig."""
    given = {key: value for key, value in tree.items() if value is not None or None not in family.fixed.get(key, ())}
    values = {key: read_value(key, given, default) for key, default in family.defaults.items()}
    model = {ours: values[theirs] for ours, theirs in PLAIN_KEYS.items() if theirs in values}
    model["q_lora_rank"] = values["q_lora_rank"] or 0
    model["rope"] = read_rope(tree, model["max_seq_len"])
    if model["rope_dim"] % 2:
        raise CheckpointError(f"config.json has qk_rope_head_dim={model['rope_dim']}; supported are even numbers")
    check_layer_types(tree, model["num_layers"])
    if "n_routed_experts" not in values:
        return model | {"num_experts": 0, "num_dense_layers": model["num_layers"], "mtp_depth": 0}
    model["num_dense_layers"] = count_dense_layers(tree, model["num_layers"], model["num_dense_layers"])
    model["router"] = {"normalize": values["norm_topk_prob"], "scale": values["routed_scaling_factor"]}
    if family.score == "softmax":
        model["router"] |= {"score": "softmax", "group_score": "max", "bias": "none"}
        model |= read_groups(values)
    return model


def read_value(key: str, tree: Mapping[str, Any], default: Any) -> Any:
    """The value of a key, of the type and in the range that it must have."""
    value = tree.get(key, default)
    if value is None and (key == "q_lora_rank" or key not in tree or default is None):
        if key == "num_experts_per_tok":
            raise CheckpointError(f"config.json lacks {key}")
        return None  # null is the absence of a low rank, and of groups
    if value is None and key in ("num_nextn_predict_layers", "initializer_range", "embedding_initializer_range"):
        return default  # no forward pass depends on them
    if value is None:
        raise CheckpointError(f"config.json has {key}=null, which says nothing: give its value, or leave it out")
    if key in RANGES:
        return read_count(key, value, *RANGES[key])
    if isinstance(default, float):
        return read_number(key, value)
    if type(value) is not type(default):
        wanted = "true or false" if isinstance(default, bool) else "a string"
        raise CheckpointError(f"config.json has {key}={show(value)}; it must be {wanted}")
    return value


def read_count(key: str, value: Any, least: int, most: int) -> int:
    """A whole number between `least` and `most`."""
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"config.json has {key}={show(value)}; it must be a whole number from {least} to {most}")
    return value


def read_number(key: str, value: Any, *, zero: bool = False) -> float:
    """A finite number above 0, or not below it with `zero`."""
    is_number = type(value) in (int, float)
    if not is_number or not (0 < value < LARGEST_NUMBER or (zero and value == 0)):
        least = "of at least 0" if zero else "above 0"
        raise CheckpointError(f"config.json has {key}={show(value)}; it must be a number {least}")
    return float(value)


def read_groups(values: Mapping[str, Any]) -> dict[str, int]:
    """The groups of experts in DeepSeek-V2, which are used by one method of two."""
    match values["topk_method"]:
        case "greedy":
            return {"num_groups": 1, "top_k_groups": 1}
        case "group_limited_greedy":
            lacking = [key for key in ("n_group", "topk_group") if values[key] is None]
            if lacking:
                raise CheckpointError(f"config.json has topk_method='group_limited_greedy', but no {lacking[0]}")
            return {}
        case other:
            raise CheckpointError(
                f"config.json has topk_method={show(other)}; supported are greedy and group_limited_greedy"
            )


def count_dense_layers(tree: Mapping[str, Any], num_layers: int, first: int) -> int:
    """Layers before the first with experts: `first_k_dense_replace`, or as lists with an entry for every layer say."""
    counts = {"first_k_dense_replace": min(first, num_layers)} if "first_k_dense_replace" in tree else {}
    for key, (dense, sparse) in LAYER_LISTS.items():
        value = tree.get(key)
        if value is None or (key == "moe_layer_freq" and value == 1 and type(value) is int):
            continue
        count = value.count(dense) if isinstance(value, list) else 0
        if value != [dense] * count + [sparse] * (num_layers - count):
            wanted = f"{show(dense)} for the first layers, then {show(sparse)}, {num_layers} in all"
            raise CheckpointError(f"config.json has {key}={show(value)}; supported is a list of {wanted}")
        counts[key] = count
    if len(set(counts.values())) > 1:
        said = " but ".join(f"{count} dense layers ({key})" for key, count in counts.items())
        raise CheckpointError(f"config.json names {said}")
    return next(iter(counts.values()), min(first, num_layers))


def check_layer_types(tree: Mapping[str, Any], num_layers: int) -> None:
    """Refuse layers with windows or other attention."""
    types = tree.get("layer_types")
    if types is not None and types != ["full_attention"] * num_layers:
        raise CheckpointError(
            f"config.json has layer_types={show(types)}; supported is 'full_attention' for each of {num_layers} layers"
        )


def read_rope(tree: Mapping[str, Any], max_seq_len: int) -> dict[str, Any]:
    """RoPE settings in either form: `rope_theta` and `rope_scaling`, or `rope_parameters` of transformers 5."""
    forms = {key: tree[key] for key in ("rope_scaling", "rope_parameters") if tree.get(key) not in (None, {})}
    for key, form in forms.items():
        check_rope_keys(key, form)
    if len(forms) == 2 and forms["rope_scaling"] != forms["rope_parameters"]:
        raise CheckpointError("config.json has both rope_scaling and rope_parameters, and they differ: remove one")
    scaling: dict[str, Any] = dict(next(iter(forms.values()), {}))
    rope: dict[str, Any] = {"theta": read_theta(scaling.get("rope_theta", tree.get("rope_theta", 10000.0)))}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return rope
    if kind != "yarn":
        raise CheckpointError(f"config.json has rope type {show(kind)}; supported are default and yarn")
    original = scaling.get("original_max_position_embeddings", max_seq_len)
    original = read_count("original_max_position_embeddings", original, 1, RANGES["max_position_embeddings"][1])
    if "factor" not in scaling:
        raise CheckpointError("config.json has YaRN without a factor")
    factor = max_seq_len / original if scaling["factor"] is None else read_number("factor", scaling["factor"])
    if factor < 1:
        raise CheckpointError(f"config.json has a YaRN factor of {factor:g}; supported are factors from 1 on")
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
    numbers = {name: read_number(name, scaling.get(name) or value, zero=not value) for name, value in defaults.items()}
    return rope | {"factor": factor, "original_max_seq_len": original, **numbers}


def read_theta(value: Any) -> float:
    """The base of the frequencies."""
    theta = read_number("rope_theta", value)
    if theta <= 1:
        raise CheckpointError(f"config.json has rope_theta={show(value)}; it must be more than 1")
    return theta


def check_rope_keys(key: str, form: Any) -> None:
    """Refuse settings of RoPE that might change the function."""
    if not isinstance(form, Mapping):
        raise CheckpointError(f"config.json has {key}={show(form)}, which is no object")
    for name, allowed in ROPE_FIXED.items():
        if name in form and not is_one_of(form[name], allowed):
            raise CheckpointError(f"config.json has {name}={show(form[name])} in {key}, which is not supported")
    known = ROPE_KEYS | ROPE_FIXED.keys()
    unknown = sorted(name for name, value in form.items() if name not in known and value is not None)
    kind = form.get("rope_type", form.get("type", "default"))
    if unknown and kind in ("default", "yarn"):
        raise CheckpointError(f"config.json has settings in {key} that nothing here knows: {names(unknown)}")


def is_one_of(value: Any, allowed: Collection[Any]) -> bool:
    """Whether a JSON value is one of those allowed; 1 is no true."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)


def show(value: Any) -> str:
    """A value from a file, fit for a message: short, and without control characters."""
    text = "null" if value is None else repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def names(keys: Collection[str]) -> str:
    """Keys from a file, fit for a message: the first eight, quoted where they are no plain words."""
    quoted = [key if key.isidentifier() and len(key) <= 60 else show(key) for key in sorted(keys)]
    return ", ".join(quoted[:8]) + (f" and {len(quoted) - 8} more" if len(quoted) > 8 else "")
