"""A directory of packed weights, written once and mapped at every start.

    moestro pack DIR --weights int8 --out OUT   ->   config.json as it was read, tokenizer and generation files
                                                     packed.json: format, version, weights, dtype, files with sizes
                                                     packed*.safetensors: all that a served model keeps

Tensors are named after their place in the model; docs/weights.md lists them. In a file, the header and the tensors
after it are multiples of 64 bytes long, so that these tensors, above all panels, begin at multiples of 64 bytes;
tensors of other sizes come last. `VERSION` rises when names or the bytes of panels change; directories of an older
version must be packed again, they are never converted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from moestro.checkpoints.files import (
    DTYPES,
    ModelFiles,
    drop_absent_mtp,
    open_tensors,
    read_config,
    read_json,
    sync,
    sync_directory,
)
from moestro.data.tokenizer_files import FILES as TOKENIZER_FILES
from moestro.data.tokenizer_files import TEMPLATE_FOLDER
from moestro.errors import CheckpointError, ConfigError
from moestro.ops.serving.formats import FORMATS

FORMAT, VERSION = "moestro-packed", 1
INFO_NAME = "packed.json"
COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES, TEMPLATE_FOLDER)
SHARD_BYTES = 1_000_000_000
ALIGNMENT = 64
Save = Callable[[Mapping[str, Tensor]], None]
DTYPE_NAMES = {torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16"}


class PackedFiles:
    """A directory of packed weights: `config`, `format`, `dtype` of activations, and `tensors`, views of mapped files.

    Mapped files can be read to the end when the directory is renamed or deleted. `ignored_keys`: see `ModelFiles`.
    CheckpointError if it is damaged, incomplete or of another version.
    """

    def __init__(self, directory: Path, ignored_keys: Collection[str] = ()) -> None:
        self.directory = directory
        info = read_info(directory)
        self.format: str = info["weights"]
        self.dtype = DTYPES[info["dtype"]]
        self.tensors: dict[str, Tensor] = {}
        for name, size in info["files"].items():
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: pack the original again")
            if path.stat().st_size != size:
                raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}: it is damaged")
            with open_tensors(path) as file:
                self.tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config = drop_absent_mtp(read_config(directory, ignored_keys), self.tensors, "mtp.0.")

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; CheckpointError if there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory} lacks {name}")
        return self.tensors[name]


def is_packed(directory: Path) -> bool:
    """Whether a directory holds packed weights."""
    return (directory / INFO_NAME).is_file()


def read_info(directory: Path) -> dict[str, Any]:
    """The contents of packed.json; CheckpointError if it is not valid or of another version."""
    path = directory / INFO_NAME
    info = read_json(path)
    if info.get("format") != FORMAT or info.get("version") != VERSION:
        found = f"{info.get('format')} version {info.get('version')}"
        raise CheckpointError(f"{path} is {found}, and this reads {FORMAT} version {VERSION}: pack the original again")
    files = info.get("files")
    is_list = isinstance(files, dict) and all(isinstance(size, int) and Path(n).name == n for n, size in files.items())
    if info.get("weights") not in FORMATS or info.get("dtype") not in DTYPES or not files or not is_list:
        raise CheckpointError(f"{path} is damaged: it must name weights, dtype, and files with their sizes")
    return info


@contextmanager
def write_packed(out: Path, source: ModelFiles, format: str) -> Iterator[Save]:
    """Give a function that takes the parts of a model one by one; configuration and tokenizer come from `source`.

    Parts are written when they fill a shard, so that memory holds one shard and the part being packed. `out` appears
    only when everything is on disk. ConfigError if `out` already exists, CheckpointError if the disk is full.
    """
    info = {"format": FORMAT, "version": VERSION, "weights": format, "dtype": dtype_name(source.dtype)}
    with new_directory(out) as partial:
        copy_files(source.directory, partial, [name for name in COPIED if name != "config.json"])
        (partial / "config.json").write_text(json.dumps(source.tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
        shards = _Shards(partial)
        yield shards.add
        files = shards.finish()
        (partial / INFO_NAME).write_text(json.dumps(info | {"files": files}, indent=2) + "\n", "utf-8")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Give a folder that becomes `out` when all is written and on disk; nothing is left of it if anything fails.

    ConfigError if `out` already exists, CheckpointError if the disk is full.
    """
    claim(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir()
        yield partial
        sync_directory(partial)
        os.rename(partial, out)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {out}: {reason}; nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # already gone if all went well
    sync(out.parent)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that are there, and the files of named folders."""
    for name in names:
        place = source / name
        for file in sorted(place.iterdir()) if place.is_dir() else [place]:
            if file.is_file():
                (target / file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target / file.relative_to(source))


def claim(out: Path) -> None:
    """Make the folder in which to write a directory; ConfigError if something is in its place."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists", hint="choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)


def dtype_name(dtype: torch.dtype) -> str:
    """What users call a precision."""
    return next(name for name, known in DTYPES.items() if known == dtype)


class _Shards:
    """Files of about `SHARD_BYTES`, named once their number is known."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0
        self._pending, self._bytes = dict[str, Tensor](), 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors, and write a shard when there is enough for one."""
        for name, tensor in tensors.items():
            if self._pending and self._bytes + tensor.nbytes > SHARD_BYTES:
                self._write()
            self._pending[name] = tensor
            self._bytes += tensor.nbytes

    def finish(self) -> dict[str, int]:
        """File name -> bytes."""
        self._write()
        files = {}
        for index in range(self._count):
            name = "packed" if self._count == 1 else f"packed-{index + 1:05d}-of-{self._count:05d}"
            path = self._path(index).rename(self._directory / f"{name}.safetensors")
            files[path.name] = path.stat().st_size
        return files

    def _path(self, index: int) -> Path:
        return self._directory / f"shard-{index}"

    def _write(self) -> None:
        write_aligned(self._path(self._count), self._pending)
        self._count += 1
        self._pending, self._bytes = {}, 0


def write_aligned(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whose tensors begin at multiples of 64 bytes, but for those of odd sizes at the end.

    The format allows spaces after the header, but no holes between tensors. Bytes are written straight from memory.
    """
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT > 0, -item[1].element_size()))
    header, offset = {}, 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.view(torch.uint8).numpy().data)
