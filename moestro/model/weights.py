"""Reading and writing the weights of a Hugging Face model directory: safetensors, sharded, strictly accounted.

Reading goes tensor by tensor from memory-mapped files into the model's parameters, so that a load needs the model and
one tensor. Nothing here reads pickle, and nothing runs code that a checkpoint names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moestro.config import ModelConfig
from moestro.errors import CheckpointError
from moestro.model.hf import Slot, duplicate_names, fused_slots, hf_to_config, tensor_map
from moestro.model.transformer import Transformer

SHARD_BYTES = 5_000_000_000  # the Hugging Face default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # what users may choose
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a model directory."""
    return hf_to_config(read_json(directory / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; CheckpointError when missing or damaged."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return tree


def load_model(directory: Path, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a directory, parameters and arithmetic in `dtype` (stored precision where None), routers in fp32."""
    config = read_config(directory)
    sources = tensor_files(directory)
    config = _without_absent_mtp(config, sources)
    stored = _stored_dtype(sources)
    dtype = dtype or stored
    with torch.device("meta"):
        model = Transformer(config, dtype)
    for name, parameter in model.named_parameters():
        keep = torch.float32 if ".router." in name else dtype
        _set_tensor(model, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=keep), requires_grad=False))
    for name, buffer in model.named_buffers():
        _set_tensor(model, name, torch.zeros(buffer.shape, dtype=torch.float32))
    fill_model(model, sources)
    return model.eval()


def _set_tensor(model: Transformer, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _without_absent_mtp(config: ModelConfig, sources: dict[str, Path]) -> ModelConfig:
    """transformers drops MTP modules when it saves, and goes on naming them in config.json."""
    prefixes = tuple(f"model.layers.{config.num_layers + depth}." for depth in range(config.mtp_depth))
    if any(name.startswith(prefixes) for name in sources):
        return config
    return config.model_copy(update={"mtp_depth": 0})


def _stored_dtype(sources: dict[str, Path]) -> torch.dtype:
    name = "model.embed_tokens.weight"
    if name in sources:
        with _open(sources[name]) as file:
            if name in file.keys():  # noqa: SIM118
                dtype: torch.dtype = file.get_tensor(name).dtype
                return dtype if dtype in FLOAT_DTYPES else torch.float32
    return torch.float32  # what is missing is named when the model is filled


def fill_model(model: Transformer, sources: dict[str, Path]) -> None:
    """Copy every tensor of the files into `model`; missing, unexpected and misshapen tensors are named in one error."""
    config = model.config
    slots = tensor_map(config) | fused_slots(config)
    duplicates = set(duplicate_names(config)) - set(tensor_map(config))
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    unexpected = sorted(name for name in sources if name not in slots and name not in duplicates)
    filled = dict.fromkeys((slot.parameter for slot in slots.values()), 0)
    for path in sorted(set(sources.values())):
        with _open(path) as file:
            for name in (name for name in file.keys() if name in slots):  # noqa: SIM118
                slot = slots[name]
                target = _slice(parameters[slot.parameter], slot)
                _copy(target.detach(), file.get_tensor(name), name)
                filled[slot.parameter] += target.numel()
    missing = sorted(name for name, count in filled.items() if count != parameters[name].numel())
    if unexpected or missing:
        parts = [
            f"{what}: {_few(names)}"
            for what, names in (
                ("unexpected tensors", unexpected),
                ("parameters not (or twice) filled", missing),
            )
            if names
        ]
        raise CheckpointError("the weights do not fit config.json; " + "; ".join(parts))


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _slice(parameter: Tensor, slot: Slot) -> Tensor:
    whole = parameter if slot.expert is None else parameter[slot.expert]
    return whole if slot.stop is None else whole[slot.start : slot.stop]


def _copy(target: Tensor, value: Tensor, name: str) -> None:
    if value.shape != target.shape:
        raise CheckpointError(f"{name} has shape {list(value.shape)}, expected {list(target.shape)}")
    if value.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{name} is stored as {value.dtype}; fp8 and quantised weights are not supported yet")
    target.copy_(value)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index where there is one; refuses pickled weights by name."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index} has no weight_map of tensors to files")
        if any(Path(name).name != name for name in names.values()):
            raise CheckpointError(f"{index} names files outside its directory")
        sources = {tensor: directory / name for tensor, name in names.items()}
        absent = sorted({path.name for path in sources.values() if not path.exists()})
        if absent:
            raise CheckpointError(f"{directory} lacks {_few(absent)}, which its index names")
        return sources
    single = directory / "model.safetensors"
    if not single.exists():
        pickled = [path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
        hint = f" ({pickled[0]} is pickled and is never loaded: convert it to safetensors)" if pickled else ""
        raise CheckpointError(f"{directory} has no model.safetensors{hint}")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def model_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of a whole model, views of its parameters."""
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, slot in tensor_map(model.config).items():
        yield name, _slice(parameters[slot.parameter].detach(), slot)


def write_tensors(directory: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model*.safetensors` and, if there are several, the index; at most one shard is in memory.

    Shards are written under temporary names and named `model-00001-of-0000N` once N is known.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(
            {name: t.contiguous() for name, t in pending.items()},
            directory / f"shard-{len(shards)}.tmp",
            {"format": "pt"},
        )
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    name_shard: Callable[[int], str] = (
        (lambda i: "model.safetensors")
        if len(shards) == 1
        else (lambda i: f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
    )
    for i in range(len(shards)):
        os.replace(directory / f"shard-{i}.tmp", directory / name_shard(i))
    if len(shards) > 1:
        weight_map = {name: name_shard(i) for i, names in enumerate(shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
