"""Which files of a model directory hold its weights, found as transformers finds them and checked from headers alone.

A directory holds either `model.safetensors`, or shards `model-00001-of-0000N.safetensors` with an index of their
tensors. Index and shards must agree in both directions. Nothing here reads pickle. Files that are no regular,
complete safetensors files are each refused with what they are.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moestro.checkpoints.families import OTHER_PARTS, TEXT_PREFIXES
from moestro.checkpoints.stored import Header
from moestro.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LFS_MARK = b"version https://git-lfs"
DESCRIPTORS = Path("/dev/fd")  # files that are open can be opened again there, whatever became of their names
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a directory by name, and what was noticed on the way."""

    headers: dict[str, Header]
    notices: tuple[str, ...] = ()


def find_weights(directory: Path) -> WeightFiles:
    """The tensors of a directory; CheckpointError says in one sentence what is missing, ambiguous or damaged."""
    refuse_adapters(directory)
    index = read_index(directory)
    named = check_shards(directory, index) if index is not None else None
    shards = sorted({*named.values()}) if named is not None else find_unindexed(directory)
    headers = read_headers([directory / name for name in shards])
    notices = list_unread(directory, shards)
    if named is not None:
        compare_with_index(directory, named, headers)
    elif index is not None:
        notices.append(f"{directory}: no file is there that {INDEX} names: {SINGLE} is read, as transformers does")
    elif shards != [SINGLE]:
        notices.append(f"{directory} has no {INDEX}: its {len(shards)} shards are read by their names")
    return WeightFiles(headers, tuple(notices))


def read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file name as the index says, None if there is no index."""
    path = directory / INDEX
    if not os.path.lexists(path):
        return None
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"{path} has no weight_map of tensors to files")
    if any(Path(name).name != name or name in ("", ".", "..") for name in named.values()):
        raise CheckpointError(f"{path} names files outside its directory")
    return named


def find_unindexed(directory: Path) -> list[str]:
    """The file or the complete set of shards of a directory without an index."""
    shards = sorted(path.name for path in directory.glob("model-*-of-*.safetensors"))
    if os.path.lexists(directory / SINGLE):
        if shards:
            raise CheckpointError(f"{directory} holds {SINGLE} and, without an index, {few(shards)}: remove one set")
        return [SINGLE]
    sets: dict[tuple[str, int], dict[int, str]] = {}
    others: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        if found := SHARD.fullmatch(path.name):
            sets.setdefault((found[1], int(found[3])), {})[int(found[2])] = path.name
        else:
            others.append(path.name)
    sets = {key: shards for key, shards in sets.items() if key[0] == "model"} or sets
    if len(sets) > 1:
        kinds = few([f"{prefix}-…-of-{count}" for prefix, count in sorted(sets)])
        raise CheckpointError(f"{directory} has no {INDEX}, and shards of several sets ({kinds}): keep one set")
    for (_, count), numbered in sets.items():
        lacking = [str(number) for number in range(1, min(count, 10**5) + 1) if number not in numbered]
        if lacking or len(numbered) != count:
            problem = f"; it lacks number {few(lacking)}" if lacking else ", which are not numbered from 1"
            raise CheckpointError(f"{directory} has {len(numbered)} of {count} shards{problem}{unfinished(directory)}")
        return [numbered[number] for number in sorted(numbered)]
    raise CheckpointError(f"{directory} has no {SINGLE}{explain_absence(directory, others)}")


def explain_absence(directory: Path, others: Sequence[str]) -> str:
    """What a directory without weights has instead, for a message."""
    if others:
        return f", but {few(others)}: rename the file with the model's weights"
    pickled = [path.name for path in sorted(directory.glob("*")) if path.suffix in PICKLED]
    if pickled:
        return f" ({few(pickled[:1])} is pickled and is never loaded: convert it to safetensors)"
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    if gguf:
        return f" ({few(gguf[:1])} is for llama.cpp: download the weights that it was made from)"
    return unfinished(directory)


def unfinished(directory: Path) -> str:
    """A remark on a download that was cut off, if there are traces of one."""
    folders = (directory, directory / ".cache" / "huggingface" / "download")
    cut = any(True for folder in folders for _ in folder.glob("*.incomplete"))
    return "; its download was cut off: start it again" if cut else ""


def refuse_adapters(directory: Path) -> None:
    """Refuse a directory whose weights are to be changed by an adapter, which transformers would apply."""
    found = [name for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
             if os.path.lexists(directory / name)]  # fmt: skip
    if found:
        raise CheckpointError(
            f"{directory} has an adapter ({found[0]}), which is not applied here: merge it into the weights, or move "
            "it away"
        )


def check_shards(directory: Path, named: dict[str, str]) -> dict[str, str] | None:
    """The index if all its files are there, None if none is but `model.safetensors`, which transformers then takes.

    CheckpointError if some are missing, or if `model.safetensors` is a second set of weights: transformers takes it,
    vLLM takes the shards.
    """
    shards = {*named.values()}
    absent = sorted(name for name in shards if not os.path.lexists(directory / name))
    has_single = SINGLE not in shards and os.path.lexists(directory / SINGLE)
    if has_single and len(absent) == len(shards):
        return None
    if absent:
        raise CheckpointError(f"{directory} lacks {few(absent)}, which its index names{unfinished(directory)}")
    if has_single:
        raise CheckpointError(
            f"{directory} holds two sets of weights, {SINGLE} and the shards of {INDEX}, and other programs differ in "
            "which they take: remove one"
        )
    return named


def list_unread(directory: Path, read: Collection[str]) -> list[str]:
    """A notice that names weights beside those that are read."""
    patterns = ("*.safetensors", "*.gguf", "pytorch_model*.bin", "consolidated*.pth")
    unread = sorted({path.name for pattern in patterns for path in directory.glob(pattern)} - set(read))
    return [f"{directory}: not read, as transformers does not read them: {few(unread)}"] if unread else []


def compare_with_index(directory: Path, named: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Refuse an index and shards that name different tensors, or the same tensors in different files."""
    lacking = [name for name, file in named.items() if name not in headers or headers[name].path.name != file]
    if lacking:
        file = named[lacking[0]]
        raise CheckpointError(f"{directory}: {INDEX} says that {file} has {few(lacking)}, but it has not")
    unnamed = sorted(headers.keys() - named.keys())
    if unnamed:
        path = headers[unnamed[0]].path
        raise CheckpointError(f"{path} has {few(unnamed)}, which {INDEX} does not name: make the index again")


def text_names(names: Collection[str]) -> dict[str, str]:
    """The tensors of the text part of a model that also reads images: name in a model of text -> name in the files."""
    found: dict[str, str] = {}
    for name in names:
        prefix = next((prefix for prefix in TEXT_PREFIXES if name.startswith(prefix)), "")
        if not name.startswith(OTHER_PARTS):
            found[TEXT_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = name
    return found


def read_headers(paths: Sequence[Path]) -> dict[str, Header]:
    """What the files say of their tensors, by name."""
    headers: dict[str, Header] = {}
    for path in paths:
        with open_tensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: Header(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        if twice := found.keys() & headers.keys():
            raise CheckpointError(f"{path} repeats {few(sorted(twice))}")
        headers |= found
    return headers


def open_tensors(path: Path, again: Path | None = None) -> Any:
    """A memory-mapped safetensors file; CheckpointError says what is wrong with it. `again`: another way to it."""
    check_regular(path if again is None else again, path)
    try:
        return safe_open(again or path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} {explain_damage(path, error)}") from error


def check_regular(path: Path, name: Path | None = None) -> None:
    """Refuse what is no regular file with something in it; opening a pipe would wait for ever."""
    name = name or path
    try:
        status = path.stat()
    except OSError as error:
        broken = " (a broken link)" if error.errno == errno.ENOENT and path.is_symlink() else ""
        raise CheckpointError(f"cannot read {name}: {error.strerror}{broken}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise CheckpointError(f"{name} is {kind}, not a file")
    if status.st_size == 0:
        raise CheckpointError(f"{name} is empty")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_MARK))
    except OSError as error:
        remedy = ": change its permissions" if error.errno == errno.EACCES else ""
        raise CheckpointError(f"cannot read {name}: {error.strerror}{remedy}") from error
    if start == LFS_MARK:
        raise CheckpointError(
            f"{name} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its directory"
        )


def explain_damage(path: Path, error: Exception) -> str:
    """What is wrong with a regular file that safetensors cannot open."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= min(size, LARGEST_HEADER) else {}
        end = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if end > size:
            return f"is cut off: it has {size:,} of {end:,} bytes: download it again"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OSError):
        pass  # not even its header can be read
    return f"is damaged or incomplete: {error}"


class HeldFiles:
    """Safetensors files that are kept open, so that they can be mapped again when they are renamed or deleted."""

    def __init__(self, paths: Collection[Path]) -> None:
        self._held: dict[Path, int] = {}
        weakref.finalize(self, close_all, self._held)
        if DESCRIPTORS.is_dir():
            for path in paths:
                self._held[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def open(self, path: Path) -> Any:
        """The file, mapped once more."""
        return open_tensors(path, DESCRIPTORS / str(self._held[path]) if path in self._held else None)


def close_all(held: Mapping[Path, int]) -> None:
    """Close descriptors."""
    for descriptor in held.values():
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; CheckpointError if it is missing or damaged."""
    check_regular(path)
    try:
        tree = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return tree


def few(names: Sequence[str]) -> str:
    """The first four names, without control characters, and the number of others."""
    shown = [name if name.isprintable() else repr(name) for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
