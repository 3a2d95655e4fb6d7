"""Linux files that say what the system has and what this process may use; other systems lack them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def read_text(path: Path) -> str:
    """The text of a system file; empty if this system has no such file or does not let us read it."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def control_groups(membership: Path, root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, from its own up to the root, v2 then v1.

    Inside a container the listed path is often the host's and does not exist; its parents are still valid.
    """
    for line in read_text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        own = top / path.lstrip("/")
        yield own
        yield from (parent for parent in own.parents if parent.is_relative_to(top))
