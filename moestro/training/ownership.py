"""One writer for a directory: a lock that the system drops when its process ends, however that happens.

The file `writer.lock` in the directory holds the process id of its latest writer and stays there; only the lock on it
counts. Reading needs none.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moestro.errors import ConfigError, MoestroError

LOCK = "writer.lock"


@contextmanager
def own_directory(directory: Path, is_begun: Callable[[Path], bool]) -> Iterator[None]:
    """Be the only writer of `directory` inside `with`; it is made if need be.

    If the work ends by an error or a signal before it `is_begun`, everything that was added is removed again. Raises
    `MoestroError`, which names the process, if another one writes here.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} exists and is not a folder", hint="choose another --out")
    made = _make_folders(directory)
    before = set(os.listdir(directory))
    lock = FileLock(directory / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise MoestroError(f"{directory} is being written by {_describe_holder(directory / LOCK)}") from error
    except BaseException:
        _remove_folders(made)
        raise
    try:
        (directory / LOCK).write_text(f"{os.getpid()}\n", "ascii")
        yield
    except BaseException:
        if not is_begun(directory):
            _remove_entries(directory, set(os.listdir(directory)) - before)
            _remove_folders(made)
        raise
    finally:
        lock.release()


def _describe_holder(lock: Path) -> str:
    """As "process 4711 since 2026-11-28 09:30"; the file's time is that of its last start."""
    try:
        pid, since = int(lock.read_text("ascii")), time.localtime(lock.stat().st_mtime)
    except (OSError, ValueError):  # it has not been written yet
        return "another process"
    return f"process {pid} since {time.strftime('%Y-%m-%d %H:%M:%S', since)}"


def _make_folders(directory: Path) -> list[Path]:
    """Make a directory and what is missing above it; returns those made by this call, the innermost first."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            with suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                made.insert(0, folder)
    except OSError:
        _remove_folders(made)
        raise
    return made


def _remove_entries(directory: Path, names: set[str]) -> None:
    for path in (directory / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove_folders(folders: list[Path]) -> None:
    """Those that are empty; `folders` lists the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
