"""`moestro inspect`: what a model costs, before anything is trained or loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moestro.cli.estimate import estimate, list_estimate
from moestro.cli.output import print_json, print_rows
from moestro.cli.process import IgnoredKeys, Threads, use_threads
from moestro.config import Config, ModelConfig, build_config, load_preset, preset_names

if TYPE_CHECKING:
    from moestro.checkpoints.files import ModelFiles
    from moestro.checkpoints.packed import PackedFiles


def inspect(
    model: str,
    *overrides: str,
    keys: IgnoredKeys = frozenset(),
    context: int | None = None,
    tokens: int | None = None,
    measure: bool = True,
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Show what a model costs, whether it runs here, and how fast at best.

    Of a directory with weights, also the format and the bytes of every part, as stored and as served; only the headers
    of its files are read.

    Parameters
    ----------
    model
        A preset's name, a run, a checkpoint, a Hugging Face directory, or packed weights.
    overrides
        Settings as model.key=value.
    context
        Tokens to count the cache for; 4096 or the model's maximum without it.
    tokens
        Tokens to train on; 20 for every active parameter without it.
    measure
        Measure memory and products for a second; without it no speeds are told.
    json_output
        Print everything as one JSON object.
    """
    from moestro.checkpoints.describe import describe_weights
    from moestro.checkpoints.files import ModelFiles
    from moestro.model.size import describe_size

    source = None if overrides else open_weights(model, keys)
    whole = read_whole_config(model, overrides, keys)
    description = describe_size(source.config if source else whole.model) | describe_packing(model)
    if isinstance(source, ModelFiles):
        description["files"] = describe_weights(source)
    use_threads(threads)
    description |= estimate(source or whole.model, whole, context=context, tokens=tokens, measure=measure)
    if json_output:
        print_json({"name": model, **description})
        return
    print_rows(
        [("model", model), *list_costs(description), *list_files(description.get("files")), *list_estimate(description)]
    )


def list_costs(description: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows that say what a model costs wherever it runs."""
    parameters, cache, weights = (description[k] for k in ("parameters", "cache_bytes_per_token", "weight_bytes"))
    rows = [
        (
            "parameters",
            f"{format_count(parameters['total'])} total, {format_count(parameters['active'])} active",
        ),
        (
            "",
            f"{format_count(parameters['active_without_input_embedding'])} active without the input embedding",
        ),
        ("routed experts", format_count(parameters["routed_experts"])),
        (
            "MTP modules",
            f"{format_count(parameters['mtp'])} more, {format_count(parameters['mtp_active'])} active",
        ),
        ("cache per token", ", ".join(f"{size:,} B {name}" for name, size in cache.items())),
        ("weights", ", ".join(f"{size / 1e9:,.2f} GB {name}" for name, size in weights.items())),
        ("flops per token", f"{description['flops_per_token'] / 1e9:,.3f} G to run (empty context)"),
        (
            "",
            f"{description['training_flops_per_token'] / 1e9:,.3f} G to train (4096 tokens or the model's length)",
        ),
    ]
    if "packed" in description:
        packed = description["packed"]
        rows.append(("packed", f"{packed['weights']} for {packed['dtype']}, {packed['bytes'] / 1e9:,.2f} GB"))
    return rows


def describe_packing(model: str) -> dict[str, Any]:
    """{"packed": {"weights", "dtype", "bytes"}} for a directory of packed weights, an empty dict for others."""
    from moestro.checkpoints.packed import is_packed, read_info

    if model in preset_names() or not is_packed(Path(model)):
        return {}
    info = read_info(Path(model))
    return {"packed": {"weights": info["weights"], "dtype": info["dtype"], "bytes": sum(info["files"].values())}}


def open_weights(model: str, ignored: Collection[str]) -> ModelFiles | PackedFiles | None:
    """The files of a directory with weights, of which only headers are read."""
    from moestro.engine.language_model import find_model_directory, open_source

    if model in preset_names():
        return None
    directory = find_model_directory(Path(model))
    return open_source(directory, "auto", ignored) if any(directory.glob("*.safetensors")) else None


def read_whole_config(model: str, overrides: tuple[str, ...], ignored: Collection[str] = ()) -> Config:
    """The configuration that a name or a path means, with settings of training: a preset's own, else the defaults."""
    if model in preset_names():
        return build_config(load_preset(model), overrides)
    sizes = read_model_config(model, (), ignored).model_dump(mode="json")
    longest = min(512, sizes["max_seq_len"])
    return build_config({"model": sizes, "train": {"seq_len": longest}}, overrides)


def list_files(files: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The rows that say how weights are stored and served."""
    if files is None:
        return []
    rows = [("files", f"{files['format']}; {format_sizes(files['stored'])}")]
    rows += [("", f"{group}: {format_sizes(sizes)}") for group, sizes in files["parts"].items()]
    rows.append(("served as stored", format_sizes(files["served"])))
    rows += [("", f"{format_size(size)} dequantised for {reason}") for reason, size in files["dequantised"].items()]
    return rows


def format_sizes(sizes: dict[str, int]) -> str:
    """Bytes by format, the largest first."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{format_size(size)} {name}" for name, size in ordered)


def format_size(size: int) -> str:
    """12,345,678 bytes as 12.35 MB."""
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e5 else ("kB", 1e3)
    return f"{size / scale:,.2f} {unit}"


def read_model_config(model: str, overrides: tuple[str, ...], ignored: Collection[str] = ()) -> ModelConfig:
    """The ModelConfig that a name or a path means, with overrides."""
    if model in preset_names():
        return build_config(load_preset(model), overrides).model
    from moestro.checkpoints.files import read_config
    from moestro.engine.language_model import find_model_directory

    config = read_config(find_model_directory(Path(model)), ignored)
    return build_config({"model": config.model_dump(mode="json")}, overrides).model


def format_count(count: int) -> str:
    """1,234,567,890 as 1.23B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:,.2f}{unit}"
    return str(count)
