"""The files of a folder that hold text, in sorted order, and why others are left out.

What is hidden, empty, of another kind, or a folder seen before (symbolic links) is counted. Of a Hugging Face data set
on disk only the split `train` is read, as from the hub, and its own bookkeeping is not text. Models and runs below the
folder, such as `runs/` of an earlier command, are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PLAIN = (".txt", ".md", ".rst", ".tex", ".py")
RECORDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
SUFFIXES = (*PLAIN, *RECORDS)
COMPRESSED = (".gz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz")
DOCUMENTS = (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html", ".htm", ".pptx", ".xlsx")
NO_SUFFIX = "without a suffix"
_BOOKKEEPING = frozenset({"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json"})
_OF_MODELS = ("tokenizer.json", "data/tokenizer.json")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(-\d+-of-\d+.*)?")


@dataclass(frozen=True)
class SourceFile:
    """A file to read. `folder_domain` is the domain that its folder gives it, if any."""

    path: Path
    kind: str
    folder_domain: str | None
    default_domain: str


@dataclass
class Found:
    """Files to read, how many others there are by reason, and folders that cannot be opened, with the reason."""

    files: list[SourceFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def kind_of(path: Path) -> str | None:
    """The suffix that decides how `path` is read, ignoring compression; None for files that are not read."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def advise(suffix: str) -> str:
    """What to do with a file that is not read."""
    if suffix in ARCHIVES:
        return "unpack it first"
    return (
        "convert it to text first" if suffix in DOCUMENTS else f"known are {' '.join(SUFFIXES)}, each also .gz or .zst"
    )


def single_file(path: Path, kind: str) -> SourceFile:
    """A file that was named by itself: its stem is the domain."""
    return SourceFile(path, kind, None, path.name.lstrip(".").split(".")[0])


def find_files(root: Path) -> Found:
    """Everything below `root`."""
    found = Found()
    for path, kind in _walk(root, set(), found):
        parts = path.relative_to(root).parts
        found.files.append(SourceFile(path, kind, parts[0] if len(parts) > 1 else None, "text"))
    return _leave_other_splits(found)


def _walk(folder: Path, seen: set[Path], found: Found) -> Iterator[tuple[Path, str]]:
    try:
        seen.add(folder.resolve())
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except (OSError, RuntimeError) as error:
        found.problems.append((folder, f"cannot read folder: {getattr(error, 'strerror', None) or error}"))
        return
    for entry in entries:
        reason = _reason_to_skip(entry, seen)
        if reason is not None:
            found.skipped[reason] += 1
        elif entry.is_dir():
            yield from _walk(entry, seen, found)
        else:
            kind = kind_of(entry)
            assert kind is not None
            yield entry, kind


def _reason_to_skip(entry: Path, seen: set[Path]) -> str | None:
    try:
        if entry.name.startswith("."):
            return "hidden"
        if entry.is_dir():
            if any((entry / name).exists() for name in _OF_MODELS):
                return "a model or run"
            return "a folder seen before" if entry.resolve() in seen else None
        if not entry.exists():
            return "a broken link"
        if not entry.is_file():
            return "not a regular file"
        if entry.name in _BOOKKEEPING:
            return "bookkeeping of a data set"
        if kind_of(entry) is None:
            return entry.suffix.lower() or NO_SUFFIX
        return None if entry.stat().st_size else "empty"
    except (OSError, RuntimeError):  # a link to itself; a folder that may be listed and not entered
        return "a broken link" if entry.is_symlink() else "not accessible"


def _leave_other_splits(found: Found) -> Found:
    """Without the splits beside `train` of a data set in the forms of the hub or of `save_to_disk`."""
    columnar = {file.path: _split_of(file.path) for file in found.files if file.kind in (".parquet", ".arrow")}
    if "train" in columnar.values():
        others = {path for path, split in columnar.items() if split not in (None, "train")}
        found.skipped["another split of a data set"] += len(others)
        found.files = [file for file in found.files if file.path not in others]
    found.skipped = +found.skipped
    return found


def _split_of(path: Path) -> str | None:
    for name in (path.name.split(".")[0], path.parent.name):
        match = _SPLIT.fullmatch(name)
        if match:
            return match[1]
    return None
