"""Where the matrices of a served model come from: packed as it is loaded, or packed before, and mapped.

`runtime.py` asks a `Packer` for one part after the other, by name. Those calls are the only list of what is packed and
how: they pack a model in memory, pack a model's files a matrix at a time, name what `packed_directory.py` saves, and
take from mapped files what was saved, held against what config.json asks for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from moestro import machine
from moestro.checkpoints.files import ModelFiles, kept_dtype, refuse_misfits
from moestro.checkpoints.packed import PackedFiles, Save
from moestro.errors import CheckpointError, ConfigError
from moestro.model.transformer import Transformer
from moestro.ops.serving.formats import FORMATS, RowSource, Stack, plain_format
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear

Source = Transformer | ModelFiles | PackedFiles
Part = TypeVar("Part", PackedLinear, PackedHeads, PackedExperts)


class HeldWeights:
    """The weights of a model in memory, given as `ModelFiles` gives those of a directory."""

    def __init__(self, model: Transformer) -> None:
        self._tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def parts(self, parameter: str, expert: int | None = None) -> list[Tensor]:
        """The parameter itself, or one expert's share of it."""
        whole = self._tensors[parameter].detach()
        return [whole if expert is None else whole[expert]]


class Packer:
    """Gives the parts of a served model, by name; names are below the place `at` which it stands.

    `model` is the structure, without weights. Weights are rounded to `dtype`, that of the activations, before they are
    packed in `format`; routers stay in fp32. `parts` is everything packed so far. With `save`, every part goes there
    when it is packed, and only its outline is kept and given, on the meta device.
    """

    def __init__(self, source: Source, format: str | None = None, save: Save | None = None) -> None:
        """ConfigError for a format that is not known, or not that of packed files."""
        self.format, self.dtype = choose_format(source, format), source.dtype
        with torch.device("meta"):
            self.model = Transformer(source.config, source.dtype).eval()
        self.parts: dict[str, PackedLinear | PackedHeads | PackedExperts] = {}
        self._plain: dict[str, Tensor] = {}
        self._saved = source if isinstance(source, PackedFiles) else None
        self._outline = HeldWeights(self.model)
        self._weights: HeldWeights | ModelFiles = self._outline
        if not isinstance(source, PackedFiles):
            self._weights = HeldWeights(source) if isinstance(source, Transformer) else source
        self._place, self._save = "", save

    def at(self, name: str) -> Packer:
        """The same packer for what lies below `name`."""
        inner = copy.copy(self)
        inner._place = f"{self._place}{name}."
        return inner

    def plain(self, name: str) -> Tensor:
        """A parameter that stays as it is."""
        name = self._place + name
        shape, dtype = self._outline.parts(name)[0].shape, kept_dtype(name, self.dtype)
        if self._saved is None:
            value = torch.empty(shape, dtype=dtype).copy_(self._weights.parts(name)[0])
        else:
            value = self._saved.tensor(name)
            if (value.shape, value.dtype) != (shape, dtype):
                found, wanted = f"{value.dtype} {list(value.shape)}", f"{dtype} {list(shape)}"
                raise CheckpointError(f"{self._saved.directory}: {name} is {found}; config.json asks for {wanted}")
        if self._save is not None:
            self._save({name: value})
            value = value.to("meta")
        self._plain[name] = value
        return value

    def linear(self, name: str, *parameters: str, format: str | None = None) -> PackedLinear:
        """One product for parameters [M, K] with the same input, their outputs one after the other."""
        format, parameters = format or self.format, tuple(self._place + parameter for parameter in parameters)
        shapes = [self._outline.parts(parameter)[0].shape for parameter in parameters]
        dtype = kept_dtype(parameters[0], self.dtype)

        def pack() -> PackedLinear:
            rows = [part for parameter in parameters for part in self._weights.parts(parameter)]
            return PackedLinear.pack(RowSource(rows, dtype), format)

        return self._part(name, PackedLinear, (format, sum(rows for rows, _ in shapes), shapes[0][1]), pack)

    def heads(self, name: str, parameter: str, count: int, choose: Callable[[Tensor], Tensor]) -> PackedHeads:
        """A matrix [V, K] per head, in the precision of activations: `choose` takes it out of [heads, …, columns]."""
        parameter, format = self._place + parameter, plain_format(self.dtype)

        def chosen(weights: HeldWeights | ModelFiles) -> Tensor:
            return choose(torch.cat(weights.parts(parameter)).to(self.dtype).unflatten(0, (count, -1)))

        sizes = [format, *map(int, chosen(self._outline).shape)]
        return self._part(name, PackedHeads, sizes, lambda: PackedHeads.pack(chosen(self._weights), format))

    def experts(self, name: str) -> PackedExperts:
        """The routed experts of a layer, read one at a time."""

        def stack(parameter: str) -> Stack:
            parameter = f"{self._place}{name}.{parameter}"
            shape = self._outline.parts(parameter)[0].shape
            matrices = (torch.cat(self._weights.parts(parameter, e)).to(self.dtype) for e in range(shape[0]))
            return Stack(shape, matrices)

        gate_up, down = stack("gate_up"), stack("down")
        sizes = (self.format, *down.shape)
        part = self._part(name, PackedExperts, sizes, lambda: PackedExperts.pack(gate_up, down, self.format))
        machine.return_freed_memory()  # what was read
        return part

    def finish(self) -> dict[str, Tensor]:
        """Everything that was given, by name. CheckpointError if packed files hold more."""
        tensors = dict(self._plain)
        for name, part in self.parts.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in part.tensors().items()}
        if self._saved is not None:
            refuse_misfits({"unexpected tensors": self._saved.tensors.keys() - tensors.keys()})
        return tensors

    def _part(self, name: str, form: type[Part], sizes: Sequence[object], pack: Callable[[], Part]) -> Part:
        name = self._place + name
        part = pack() if self._saved is None else self._take(self._saved, name, form, sizes)
        if self._save is not None:
            tensors = part.tensors()
            self._save({f"{name}.{key}": tensor for key, tensor in tensors.items()})
            outlines = {key: tensor if key == "sizes" else tensor.to("meta") for key, tensor in tensors.items()}
            part = form.from_tensors(outlines)
        self.parts[name] = part
        return part

    def _take(self, saved: PackedFiles, name: str, form: type[Part], sizes: Sequence[object]) -> Part:
        try:
            part = form.from_tensors({key: saved.tensor(f"{name}.{key}") for key in form.names})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.directory}: {name} is damaged: {error}") from error
        if part.sizes != tuple(sizes):
            found, wanted = (" x ".join(map(str, numbers)) for numbers in (part.sizes, sizes))
            raise CheckpointError(f"{saved.directory}: {name} is {found}; config.json asks for {wanted}")
        return part


def choose_format(source: Source, format: str | None) -> str:
    """How matrices are packed; ConfigError for a format that is not known, or not that of packed files."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"weights must be one of {', '.join(FORMATS)}, not '{format}'")
    if not isinstance(source, PackedFiles):
        return format or plain_format(source.dtype)
    if format not in (None, source.format):
        raise ConfigError(
            f"{source.directory} holds {source.format} weights, not {format}: pack the original as {format}"
        )
    return source.format
