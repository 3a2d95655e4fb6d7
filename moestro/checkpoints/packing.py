"""A model's weights as the parts used for serving: packed from a model or its files, or mapped from packed files.

`model/parts.py` lists the parts. `pack_model` gives all parts of a source, `write_parts` packs and saves one part after
the other, and `refill` packs another model into the memory of existing parts. A model's files are read one matrix at a
time, so that memory holds what is packed and little more. Packed files stay mapped, and each part is checked against
config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from moestro.ops.serving.codes import Codes
from moestro.ops.serving.formats import FORMATS, RowSource, plain_format
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear

Source = Transformer | ModelFiles | PackedFiles
Sizes = dict[str, int]  # bytes by the name of a part
Shapes = Mapping[str, Sequence[int]]
PACKED: Mapping[str, type[PackedLinear] | type[PackedHeads] | type[PackedExperts]]
PACKED = {"linear": PackedLinear, "heads": PackedHeads, "experts": PackedExperts}


@dataclass(frozen=True)
class PackedModel:
    """The parts of a served model by name, in the order of `served_parts`.

    Matrices are packed as `format` (`Part.format` has the exceptions). Activations are computed in `dtype`, and weights
    were rounded to it first, unless they were stored as codes, which are kept. `mapped` is the directory whose files
    the parts are views of, None if the parts have their own memory.
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

    def kept_format(self, parameter: str) -> str | None:
        """The format of the codes that a parameter is stored as, if packed weights can keep them, else None."""

    def codes(self, parameter: str, expert: int | None = None) -> list[Codes] | None:
        """The same rows as stored codes; None if they are stored as numbers."""


class HeldWeights:
    """The weights of a model in memory, read in the same way as `ModelFiles` reads a directory."""

    def __init__(self, model: Transformer) -> None:
        self._tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def parts(self, parameter: str, expert: int | None = None) -> list[Tensor]:
        """The parameter itself, or one expert's share of it."""
        whole = self._tensors[parameter].detach()
        return [whole if expert is None else whole[expert]]

    def kept_format(self, parameter: str) -> str | None:
        """None: a model in memory has numbers."""
        return None

    def codes(self, parameter: str, expert: int | None = None) -> list[Codes] | None:
        """None, as well."""
        return None


def pack_model(source: Source, format: str | None = None) -> PackedModel:
    """All parts of a model in memory, of a model's files, or of packed files, which stay mapped.

    `format` is one of `FORMATS`, by default that of the packed files, that of the codes in a model's files, or the one
    that keeps weights as they are computed with. Codes of the same format are kept, and beside them all that is stored
    as numbers. ConfigError if the format is unknown or differs from that of packed files; CheckpointError if packed
    files do not match config.json.
    """
    format = choose_format(source, format)
    config, dtype, shapes = source.config, source.dtype, parameter_shapes(source.config)
    parts: dict[str, PackedPart] = {}
    if isinstance(source, PackedFiles):
        for part in served_parts(config):
            parts[part.name] = _map_part(part, source, format, _dimensions(part, shapes))
        names = [name for part in parts.items() for name in saved_tensors(*part)]
        refuse_misfits({"unexpected tensors": source.tensors.keys() - set(names)})
        return PackedModel(config, dtype, format, parts, source.directory)
    packer = _Packer(_weights_of(source), shapes, format, dtype)
    parts = {part.name: packer.pack(part) for part in served_parts(config)}
    return PackedModel(config, dtype, format, parts)


def write_parts(source: Transformer | ModelFiles, format: str, save: Save) -> int:
    """Pack one part after the other and give it to `save`, keeping none; returns their total bytes."""
    packer = _Packer(_weights_of(source), parameter_shapes(source.config), format, source.dtype)

    def write(part: Part) -> int:
        tensors = saved_tensors(part.name, packer.pack(part))
        save(tensors)
        return sum(tensor.nbytes for tensor in tensors.values())

    return sum(write(part) for part in served_parts(source.config))


def packed_bytes(source: Source | ModelConfig, format: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Sizes:
    """The bytes of every part by name, as `pack_model` makes them: nothing is read.

    Of a configuration alone, for activations in `dtype`.
    """
    if isinstance(source, PackedFiles):
        return {part.name: _mapped_bytes(part, source) for part in served_parts(source.config)}
    if isinstance(source, ModelConfig):
        config, parts = source, _Packer(None, parameter_shapes(source), format or plain_format(dtype), dtype)
    else:
        config, format = source.config, choose_format(source, format)
        parts = _Packer(_weights_of(source), parameter_shapes(config), format, source.dtype)
    return {part.name: parts.count_bytes(part) for part in served_parts(config)}


def _mapped_bytes(part: Part, files: PackedFiles) -> int:
    if part.form == "plain":
        return files.tensor(part.name).nbytes
    return sum(files.tensor(f"{part.name}.{key}").nbytes for key in PACKED[part.form].names)


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
        return format or _stored_format(_weights_of(source), source.config) or plain_format(source.dtype)
    if format not in (None, source.format):
        held = source.format
        raise ConfigError(f"{source.directory} holds {held} weights, not {format}: pack the original as {format}")
    return source.format


def _weights_of(source: Transformer | ModelFiles) -> Weights:
    return HeldWeights(source) if isinstance(source, Transformer) else source


def _stored_format(weights: Weights, config: ModelConfig) -> str | None:
    """The format of the first codes among the matrices of a model, None if there are none."""
    names = (name for part in served_parts(config) if part.rule == "weights" for name in part.parameters)
    return next(filter(None, map(weights.kept_format, names)), None)


def _dimensions(part: Part, shapes: Shapes) -> tuple[int, ...]:
    """The dimensions of the matrices of a part, or of its parameter."""
    first = shapes[part.parameters[0]]
    match part.form:
        case "plain":
            return tuple(first)
        case "linear":
            return (sum(shapes[parameter][0] for parameter in part.parameters), first[1])
        case "heads":
            assert part.cut is not None
            return part.cut.shape(first[1])
        case "experts":
            return tuple(shapes[part.parameters[1]])


@dataclass(frozen=True)
class _Packer:
    """Packs the parts of one source as `format`, or keeps what it stores if it has codes of that format."""

    weights: Weights | None  # None: there are only shapes, to count bytes
    shapes: Shapes
    format: str
    dtype: torch.dtype

    def pack(self, part: Part) -> PackedPart:
        """A part in memory of its own."""
        assert self.weights is not None
        format, numbers = self._format_of(part), _dimensions(part, self.shapes)
        packed: PackedPart
        if part.form == "plain":
            packed = torch.empty(numbers, dtype=DTYPES[format])
        else:
            packed = PACKED[part.form].empty(format, *numbers)
        _fill_part(packed, part, self.weights, self.dtype)
        return packed

    def count_bytes(self, part: Part) -> int:
        """The bytes of a part, without making it."""
        format, numbers = self._format_of(part), _dimensions(part, self.shapes)
        if part.form == "plain":
            return math.prod(numbers) * DTYPES[format].itemsize
        return PACKED[part.form].count_bytes(format, *numbers)

    def _format_of(self, part: Part) -> str:
        if self.weights is not None and part.rule in ("weights", "head") and self._keeps:
            stored = {self.weights.kept_format(name) for name in part.parameters}
            return (stored.pop() if len(stored) == 1 else None) or plain_format(self.dtype)
        return part.format(self.format, self.dtype)

    @cached_property
    def _keeps(self) -> bool:
        return self.weights is not None and self.format in map(self.weights.kept_format, self.shapes)


def _fill_part(packed: PackedPart, part: Part, weights: Weights, dtype: torch.dtype) -> None:
    """Read the parameters of a part into its memory, large ones one matrix at a time; codes of its format are kept."""
    dtype, names = part.dtype(dtype), part.parameters
    keeps = not isinstance(packed, Tensor) and all(weights.kept_format(name) == packed.format for name in names)
    match packed:
        case Tensor():
            packed.copy_(weights.parts(names[0])[0])
        case PackedLinear() if keeps:
            packed.fill_codes([rows for name in names for rows in _read_codes(weights, name)])
        case PackedLinear():
            packed.fill(RowSource([rows for name in names for rows in weights.parts(name)], dtype))
        case PackedHeads():
            assert part.cut is not None
            packed.fill(part.cut.take(torch.cat(weights.parts(names[0])).to(dtype)))
        case PackedExperts():
            experts = range(packed.num_experts)
            if keeps:
                packed.fill_codes(*(_read_expert_codes(weights, name, experts) for name in names))
            else:
                packed.fill(*(_read_experts(weights, name, experts, dtype) for name in names))
            machine.return_freed_memory()  # what was read


def _read_codes(weights: Weights, parameter: str, expert: int | None = None) -> list[Codes]:
    """The codes of a parameter that is stored as codes, or of one expert's share of it."""
    found = weights.codes(parameter, expert)
    assert found is not None, parameter
    return found


def _read_expert_codes(weights: Weights, parameter: str, experts: Iterable[int]) -> Iterator[list[Codes]]:
    """The codes of a parameter, one expert at a time."""
    for expert in experts:
        yield _read_codes(weights, parameter, expert)


def _read_experts(weights: Weights, parameter: str, experts: Iterable[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """The matrices of a parameter, one expert at a time."""
    for expert in experts:
        yield torch.cat(weights.parts(parameter, expert)).to(dtype)


def _map_part(part: Part, files: PackedFiles, format: str, numbers: tuple[int, ...]) -> PackedPart:
    """A part of packed files; where the original had codes, it may be kept as numbers as well."""
    packed: PackedPart
    formats = [part.format(format, files.dtype)]
    if FORMATS[format].quantised and part.rule in ("weights", "head"):
        formats += [format, plain_format(files.dtype)]
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
    if found not in [(one, numbers) for one in formats]:
        ours, wanted = (" x ".join([one, *map(str, sizes)]) for one, sizes in (found, (formats[0], numbers)))
        raise CheckpointError(f"{files.directory}: {part.name} is {ours}; config.json asks for {wanted}")
    return packed


def _name_dtype(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))
