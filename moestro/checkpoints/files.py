"""Reading and writing the weights of a Hugging Face model directory: safetensors, sharded, strictly accounted.

`ModelFiles` is the only reader. It gives one parameter at a time, to be copied into a model (`load_model`) or packed
for serving (`checkpoints/packing.py`), so that memory holds the result and one matrix. Nothing here reads pickle or
runs code that a checkpoint names.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from moestro.checkpoints.families import WITH_TEXT_PART
from moestro.checkpoints.fit import fit_config
from moestro.checkpoints.hf import Slot, duplicate_names, fused_slots, tensor_map
from moestro.checkpoints.hf_config import correct_tree, hf_to_config, read_hf_config
from moestro.checkpoints.quantized import Scheme, read_codes, read_scales, read_scheme
from moestro.checkpoints.stored import FLOAT_FORMATS, Header, Place, Stored, find_stored, label
from moestro.checkpoints.weight_files import HeldFiles, few, find_weights, text_names
from moestro.checkpoints.weight_files import open_tensors as open_tensors
from moestro.checkpoints.weight_files import read_json as read_json
from moestro.config import ModelConfig
from moestro.errors import CheckpointError, notice
from moestro.model.transformer import Transformer
from moestro.ops.precision import precision_of
from moestro.ops.serving.codes import CodeFormat, Codes
from moestro.ops.serving.formats import FORMATS

SHARD_BYTES = 5_000_000_000  # the Hugging Face default
REMAP_BYTES = 1 << 26
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # what users may choose


def read_config(directory: Path, ignored: Collection[str] = ()) -> ModelConfig:
    """The ModelConfig of a model directory, without the keys of config.json that are in `ignored`."""
    return hf_to_config(read_json(directory / "config.json"), ignored)


def load_model(directory: Path, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a directory; `dtype`: see `ModelFiles`."""
    return read_model(ModelFiles(directory, dtype))


def read_model(files: ModelFiles) -> Transformer:
    """The whole model, with parameters and arithmetic in the precision of the files, and routers in fp32."""
    with torch.device("meta"):
        model = Transformer(files.config, precision_of(files.dtype))
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=kept_dtype(name, files.dtype))
        _set_tensor(model, name, torch.nn.Parameter(value, requires_grad=False))
    for name, buffer in model.named_buffers():
        _set_tensor(model, name, torch.zeros(buffer.shape))
    fill_model(model, files)
    return model.eval()


def fill_model(model: Transformer, files: ModelFiles) -> None:
    """Copy the weights of a directory into a model of the same sizes; CheckpointError if the sizes differ."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if {name: tensor.shape for name, tensor in tensors.items()} != files.shapes:
        raise CheckpointError(f"{files.directory} holds a model of other sizes than this one")
    for name, tensor in tensors.items():
        files.fill(name, tensor.detach())


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every parameter and buffer of a model, by name."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _set_tensor(model: Transformer, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def kept_dtype(parameter: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of a parameter in a model of `dtype`: routers are always fp32."""
    return torch.float32 if ".router." in parameter else dtype


class ModelFiles:
    """The weights of a model directory, checked against its config.json at once and read one parameter at a time.

    Tensors are views of memory-mapped files. Each file is reopened after `REMAP_BYTES`, which frees what was read.
    `dtype` is what the model is computed in, by default the stored precision (fp32 for fp16, bf16 for codes).
    `scheme` says how weights are quantised, None if all are plain. Codes and scales are checked when they are read.
    The files stay open, so that a directory that is renamed or deleted can be read to the end. `ignored_keys` of
    config.json are treated as absent; `tree` is the rest of it, corrected where the files say otherwise. `notices` say
    what was odd and could be dealt with.
    CheckpointError names every tensor that is missing, unexpected or misshapen.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None = None, ignored_keys: Collection[str] = ()) -> None:
        self.directory = directory
        whole = read_json(directory / "config.json")
        read, found = read_hf_config(whole, ignored_keys), find_weights(directory)
        has_other_parts = whole.get("model_type") in WITH_TEXT_PART
        self._file_names = text_names(found.headers) if has_other_parts else {}
        headers = {name: found.headers[own] for name, own in self._file_names.items()} or found.headers
        self.config, remarks = fit_config(read.model, headers)
        self.scheme, more = choose_scheme(read.tree, headers)
        self.notices = [*read.notices, *found.notices, *remarks, *more]
        self._held = HeldFiles({header.path for header in headers.values()})
        self._files: dict[Path, Any] = {}
        self._bytes_read = 0
        self._untie(headers)
        self.tree = correct_tree(read.tree, read.model, self.config)
        self.shapes = parameter_shapes(self.config)
        self._stored = self._account(headers)
        embedding = self._all_stored("embed.weight")
        is_wide = any(stored.format in ("fp32", "fp16") for stored in embedding)
        self.dtype = dtype or (torch.float32 if is_wide else torch.bfloat16)
        for text in self.notices:
            notice(text)

    def parts(self, parameter: str, expert: int | None = None) -> list[Tensor]:
        """The rows of a parameter, or of one expert's share of it, in as many tensors as they are stored in.

        Quantised rows are given as values, in the precision that the parameter has in the model. A router without a
        stored bias gets a bias of zeros.
        """
        dtype = kept_dtype(parameter, self.dtype)
        return [_as_values(rows, dtype) for rows in self.rows(parameter, expert)]

    def rows(self, parameter: str, expert: int | None = None) -> list[Tensor | Codes]:
        """The same rows as they are stored: as codes where they are quantised."""
        if not self._stored[parameter]:
            return [torch.zeros(self.shapes[parameter])]
        pieces = self._pieces(parameter, expert)
        return [self._read(piece.place, at) if piece.scale is None else self._codes(piece, at) for piece, at in pieces]

    def codes(self, parameter: str, expert: int | None = None) -> list[Codes] | None:
        """The same rows if all are quantised, else None."""
        pieces = self._pieces(parameter, expert)
        if not pieces or any(stored.scale is None for stored, _ in pieces):
            return None
        return [self._codes(stored, index) for stored, index in pieces]

    def fill(self, parameter: str, target: Tensor) -> None:
        """Copy a parameter to a tensor of its shape, rounded once if it is quantised."""
        for expert in self._stored[parameter]:
            whole, row = target if expert is None else target[expert], 0
            for stored in self.rows(parameter, expert):
                part = _as_values(stored, target.dtype)
                whole[row : row + len(part)].copy_(part)
                row += len(part)

    def stored_format(self, parameter: str) -> CodeFormat | None:
        """The format of a parameter's codes if all of it is stored in one, None if anything is stored as values."""
        formats = {None if stored.scale is None else stored.format for stored in self._all_stored(parameter)}
        return self.scheme.format if self.scheme is not None and formats == {self.scheme.format} else None

    def kept_format(self, parameter: str) -> CodeFormat | None:
        """`stored_format`, if packed weights can keep these codes: blocks along a row no finer than those of panels."""
        format = self.stored_format(parameter)
        fits = format and self.scheme and self.scheme.block[1] % FORMATS[format].length == 0
        return format if fits else None

    def stored_bytes(self, parameter: str) -> dict[str, int]:
        """Bytes of a parameter in the files, scales included, by format: fp32, bf16, fp16, fp8, int4."""
        counts: Counter[str] = Counter()
        for stored in self._all_stored(parameter):
            counts[stored.format] += stored.nbytes
        return dict(counts)

    @property
    def stored_formats(self) -> dict[str, int]:
        """Bytes of all parameters, as `stored_bytes`."""
        return dict(sum((Counter(self.stored_bytes(name)) for name in self.shapes), Counter()))

    def _all_stored(self, parameter: str) -> list[Stored]:
        return [stored for parts in self._stored[parameter].values() for stored in parts]

    def _pieces(self, parameter: str, expert: int | None) -> list[tuple[Stored, int | None]]:
        """The tensors with the rows asked for, each with the index of the expert in it."""
        stored = self._stored[parameter]
        if expert in stored:
            return [(part, None) for part in stored[expert]]
        return [(part, expert) for part in stored[None]] if stored else []

    def _codes(self, stored: Stored, expert: int | None) -> Codes:
        scheme, scale = self.scheme, stored.scale
        assert scheme is not None and scale is not None
        if stored.sizes is not None and self._read(stored.sizes).tolist() != list(stored.shape):
            raise CheckpointError(f"{label(stored.sizes)} is not {list(stored.shape)}")
        shape = stored.shape if expert is None else stored.shape[1:]
        codes = read_codes(scheme, self._read(stored.place, expert), shape, label(stored.place))
        scales = read_scales(scheme, self._read(scale, expert), shape, label(scale))
        return Codes(scheme.format, codes, scales, scheme.block_of(shape))

    def _read(self, place: Place, expert: int | None = None) -> Tensor:
        name, path = place
        if self._bytes_read > REMAP_BYTES:
            self._files.clear()
            self._bytes_read = 0
        if path not in self._files:
            self._files[path] = self._held.open(path)
        whole: Tensor = self._files[path].get_tensor(self._file_names.get(name, name))
        tensor = whole if expert is None else whole[expert]
        self._bytes_read += tensor.nbytes
        return tensor

    def _untie(self, headers: Mapping[str, Header]) -> None:
        """Give a model whose config.json ties head and embedding its own head if the files hold another."""
        head, embedding = headers.get("lm_head.weight"), headers.get("model.embed_tokens.weight")
        if not self.config.tie_embeddings or head is None or embedding is None:
            return
        places = (("lm_head.weight", head.path), ("model.embed_tokens.weight", embedding.path))
        one, other = (self._read(place) for place in places)
        if one.dtype != other.dtype or not torch.equal(one, other):
            self.config = self.config.model_copy(update={"tie_embeddings": False})
            self.notices.append("config.json ties head and embedding, but the files hold two matrices: both are used")

    def _account(self, headers: Mapping[str, Header]) -> dict[str, dict[int | None, list[Stored]]]:
        """Parameter -> expert (None: all of them) -> its tensors in row order."""
        slots = tensor_map(self.config) | fused_slots(self.config)
        left = {slot.parameter: self.shapes[slot.parameter].numel() for slot in slots.values()}
        stored: dict[str, dict[int | None, list[Stored]]] = {name: {} for name in self.shapes}
        unused = set(headers) - set(duplicate_names(self.config))
        for name, slot in slots.items():
            shape = slot_shape(self.shapes[slot.parameter], slot)
            found = find_stored(name, shape, slot.start or 0, headers, self.scheme)
            if found is not None:
                stored[slot.parameter].setdefault(slot.expert, []).append(found)
                left[slot.parameter] -= math.prod(shape)
                unused -= found.names
        refuse_misfits(
            {
                "unexpected tensors": unused,
                "parameters not (or twice) filled": [name for name, count in left.items() if count],
            }
        )
        lists = [parts for experts in stored.values() for parts in experts.values()]
        for parts in lists:
            parts.sort(key=lambda part: part.start)
        return stored


def choose_scheme(tree: Mapping[str, Any], headers: Mapping[str, Header]) -> tuple[Scheme | None, list[str]]:
    """How weights are quantised, and a notice if config.json announces codes where all tensors hold plain values."""
    if not all(header.dtype in FLOAT_FORMATS for header in headers.values()):
        return read_scheme(tree), []
    if not tree.get("quantization_config"):
        return None, []
    return None, ["config.json announces quantised weights, but all tensors hold plain values: they are read as such"]


def _as_values(rows: Tensor | Codes, dtype: torch.dtype) -> Tensor:
    return rows.values(dtype) if isinstance(rows, Codes) else rows


def drop_absent_mtp(config: ModelConfig, names: Iterable[str], prefix: str) -> ModelConfig:
    """Drop MTP modules that transformers did not save but config.json still names; `prefix`: the first module's."""
    if not config.mtp_depth or any(name.startswith(prefix) for name in names):
        return config
    return config.model_copy(update={"mtp_depth": 0})


def slot_shape(shape: Sequence[int], slot: Slot) -> tuple[int, ...]:
    """The shape of a tensor that fills a slot of a parameter of `shape`."""
    dims = list(shape if slot.expert is None else shape[1:])
    if slot.start is not None and slot.stop is not None:
        dims[0] = slot.stop - slot.start
    return tuple(dims)


def refuse_misfits(misfits: Mapping[str, Collection[str]]) -> None:
    """Raise CheckpointError naming some of what does not fit, by kind, unless all kinds are empty."""
    parts = [f"{what}: {few(sorted(names))}" for what, names in misfits.items() if names]
    if parts:
        raise CheckpointError("the weights do not fit config.json; " + "; ".join(parts))


def _slice(parameter: Tensor, slot: Slot) -> Tensor:
    whole = parameter if slot.expert is None else parameter[slot.expert]
    return whole if slot.stop is None else whole[slot.start : slot.stop]


def model_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) for a whole model; tensors are views of its parameters.

    Sharded parameters are gathered, so every process must go through all of them.
    """
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    gathered: dict[str, Tensor] = {}
    for name, slot in tensor_map(model.config).items():
        if slot.parameter not in gathered:
            gathered[slot.parameter] = gather(parameters[slot.parameter].detach())
        yield name, _slice(gathered[slot.parameter], slot)


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded across processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES, *, indexed: bool = False
) -> None:
    """Write `model*.safetensors` and, for several shards or if `indexed`, the index; at most one shard is in memory.

    Shards are written under temporary names and named `model-00001-of-0000N` once N is known. A tensor whose name
    begins with that of the one before, such as the scale of a matrix, is in the same file.
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
        if pending and size + tensor.nbytes > shard_bytes and not name.startswith(next(reversed(pending))):
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
    if len(shards) > 1 or indexed:
        weight_map = {name: name_shard(i) for i, names in enumerate(shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")


def sync_directory(directory: Path) -> None:
    """Force a directory's files to disk, so that a rename never outlives the data."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
