"""A model's weights as the parts used for serving: packed from a model or its files, or mapped from packed files.

`model/parts.py` lists the parts. `pack_model` gives all parts of a source, `write_parts` packs and saves one part after
the other, and `refill` packs another model into the memory of existing parts. A model's files are read one matrix at a
time, so that memory holds what is packed and little more. Packed files stay mapped, and each part is checked against
config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moestro import machine
from moestro.checkpoints.files import DTYPES, ModelFiles, parameter_shapes, refuse_misfits
from moestro.checkpoints.packed import PackedFiles, Save
from moestro.config import ModelConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.model.parts import PackedPart, Part, saved_tensors, served_parts
from moestro.model.transformer import Transformer
from moestro.ops.serving.formats import FORMATS, RowSource, plain_format
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear

Source = Transformer | ModelFiles | PackedFiles
Shapes = Mapping[str, Sequence[int]]
Sizes = tuple[str, tuple[int, ...]]  # the format, and the dimensions of the matrices or the parameter
PACKED: Mapping[str, type[PackedLinear] | type[PackedHeads] | type[PackedExperts]]
PACKED = {"linear": PackedLinear, "heads": PackedHeads, "experts": PackedExperts}


@dataclass(frozen=True)
class PackedModel:
    """The parts of a served model by name, in the order of `served_parts`.

    Matrices are packed as `format` (`Part.format` has the exceptions). Activations are computed in `dtype`, and weights
    were rounded to it first. `mapped` is the directory whose files the parts are views of, None if the parts have their
    own memory.
    """

    config: ModelConfig
    dtype: torch.dtype
    format: str
    parts: Mapping[str, PackedPart]
    mapped: Path | None = None


class Weights(Protocol):
    """Where parameters are read from: `ModelFiles`, or a model in memory."""

    def parts(self, parameter: str, expert: int | None = None) -> list[Tensor]:
        """The rows of a parameter, or of one expert's share of it, in as many tensors as they are stored in."""


class HeldWeights:
    """The weights of a model in memory, read in the same way as `ModelFiles` reads a directory."""

    def __init__(self, model: Transformer) -> None:
        self._tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def parts(self, parameter: str, expert: int | None = None) -> list[Tensor]:
        """The parameter itself, or one expert's share of it."""
        whole = self._tensors[parameter].detach()
        return [whole if expert is None else whole[expert]]


def pack_model(source: Source, format: str | None = None) -> PackedModel:
    """All parts of a model in memory, of a model's files, or of packed files, which stay mapped.

    `format` is one of `FORMATS`, by default that of the packed files or the one that keeps weights as they are
    computed with. ConfigError if the format is unknown or differs from that of packed files; CheckpointError if packed
    files do not match config.json.
    """
    format = choose_format(source, format)
    config, dtype, shapes = source.config, source.dtype, parameter_shapes(source.config)
    parts: dict[str, PackedPart] = {}
    if isinstance(source, PackedFiles):
        for part in served_parts(config):
            parts[part.name] = _map_part(part, source, _sizes(part, shapes, format, dtype))
        names = [name for part in parts.items() for name in saved_tensors(*part)]
        refuse_misfits({"unexpected tensors": source.tensors.keys() - set(names)})
        return PackedModel(config, dtype, format, parts, source.directory)
    weights = _weights_of(source)
    for part in served_parts(config):
        parts[part.name] = _pack_part(part, weights, _sizes(part, shapes, format, dtype), dtype)
    return PackedModel(config, dtype, format, parts)


def write_parts(source: Transformer | ModelFiles, format: str, save: Save) -> int:
    """Pack one part after the other and give it to `save`, keeping none; returns their total bytes."""
    weights, shapes = _weights_of(source), parameter_shapes(source.config)

    def write(part: Part) -> int:
        sizes = _sizes(part, shapes, format, source.dtype)
        tensors = saved_tensors(part.name, _pack_part(part, weights, sizes, source.dtype))
        save(tensors)
        return sum(tensor.nbytes for tensor in tensors.values())

    return sum(write(part) for part in served_parts(source.config))


def refill(packed: PackedModel, model: Transformer) -> None:
    """Pack another model of the same configuration into the same memory, rounded to the same `dtype` first.

    ConfigError for another configuration, and if the parts are mapped files; then nothing changes.
    """
    if packed.mapped is not None:
        raise ConfigError(f"{packed.mapped} is mapped and only read: load the original to change its weights")
    if model.config != packed.config:
        ours, theirs = packed.config.model_dump(), model.config.model_dump()
        names = [name for name in ours if ours[name] != theirs[name]]
        raise ConfigError(f"the new weights are of another model: {', '.join(names)} differ")
    weights = HeldWeights(model)
    for part in served_parts(packed.config):
        _fill_part(packed.parts[part.name], part, weights, packed.dtype)


def choose_format(source: Source, format: str | None) -> str:
    """How matrices are packed; ConfigError if the format is unknown or differs from that of packed files."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"weights must be one of {', '.join(FORMATS)}, not '{format}'")
    if not isinstance(source, PackedFiles):
        return format or plain_format(source.dtype)
    if format not in (None, source.format):
        held = source.format
        raise ConfigError(f"{source.directory} holds {held} weights, not {format}: pack the original as {format}")
    return source.format


def _weights_of(source: Transformer | ModelFiles) -> Weights:
    return HeldWeights(source) if isinstance(source, Transformer) else source


def _sizes(part: Part, shapes: Shapes, format: str, dtype: torch.dtype) -> Sizes:
    """The format and dimensions that a part must have."""
    first = shapes[part.parameters[0]]
    match part.form:
        case "plain":
            sizes = tuple(first)
        case "linear":
            sizes = (sum(shapes[parameter][0] for parameter in part.parameters), first[1])
        case "heads":
            assert part.cut is not None
            sizes = part.cut.shape(first[1])
        case "experts":
            sizes = tuple(shapes[part.parameters[1]])
    return part.format(format, dtype), sizes


def _pack_part(part: Part, weights: Weights, sizes: Sizes, dtype: torch.dtype) -> PackedPart:
    format, numbers = sizes
    packed: PackedPart
    if part.form == "plain":
        packed = torch.empty(numbers, dtype=DTYPES[format])
    else:
        packed = PACKED[part.form].empty(format, *numbers)
    _fill_part(packed, part, weights, dtype)
    return packed


def _fill_part(packed: PackedPart, part: Part, weights: Weights, dtype: torch.dtype) -> None:
    """Read the parameters of a part into its memory, large ones one matrix at a time."""
    dtype, first = part.dtype(dtype), part.parameters[0]
    match packed:
        case Tensor():
            packed.copy_(weights.parts(first)[0])
        case PackedLinear():
            packed.fill(RowSource([rows for name in part.parameters for rows in weights.parts(name)], dtype))
        case PackedHeads():
            assert part.cut is not None
            packed.fill(part.cut.take(torch.cat(weights.parts(first)).to(dtype)))
        case PackedExperts():
            gate_up, down = (_read_experts(weights, name, packed.num_experts, dtype) for name in part.parameters)
            packed.fill(gate_up, down)
            machine.return_freed_memory()  # what was read


def _read_experts(weights: Weights, parameter: str, num_experts: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The matrices of a parameter, one expert at a time."""
    for expert in range(num_experts):
        yield torch.cat(weights.parts(parameter, expert)).to(dtype)


def _map_part(part: Part, files: PackedFiles, sizes: Sizes) -> PackedPart:
    packed: PackedPart
    if part.form == "plain":
        packed = files.tensor(part.name)
        found = _name_dtype(packed.dtype), tuple(packed.shape)
    else:
        form = PACKED[part.form]
        tensors = {key: files.tensor(f"{part.name}.{key}") for key in form.names}
        try:
            packed = form.from_tensors(tensors)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{files.directory}: {part.name} is damaged: {error}") from error
        found = packed.format, packed.sizes
    if found != sizes:
        ours, wanted = (" x ".join([format, *map(str, numbers)]) for format, numbers in (found, sizes))
        raise CheckpointError(f"{files.directory}: {part.name} is {ours}; config.json asks for {wanted}")
    return packed


def _name_dtype(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))
