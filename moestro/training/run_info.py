"""RUN/run.json: what a run is, how it began, and every start of it.

    started, command, machine, versions   of the first start
    parameters    {total, active}
    data          {source, fingerprint of the tokenised text, files: fingerprint of names, sizes and dates, or null}
    finished      whether all planned steps are done
    starts        [{started, command, machine, versions, from_step, to_step, seconds, loss, bits_per_byte, ended}]

A start's `to_step`, `seconds` of training, `loss` (next token, nats per token, of the last step) and `bits_per_byte`
(last evaluation) are brought up to date with every checkpoint. `ended` is "finished", the signal that stopped it, or
null while it goes on and after a crash.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro import machine
from moestro.errors import MoestroError
from moestro.training.metrics import write_atomic
from moestro.version import __version__

RUN_INFO = "run.json"
OF_A_START = ("started", "command", "machine", "versions")


@dataclass
class RunInfo:
    """The file's content while a run goes on; the last of its starts is this one."""

    run: Path
    tree: dict[str, Any]

    @classmethod
    def begin(cls, run: Path, *, resumed: bool, step: int, parameters: dict[str, int], data: dict[str, Any]) -> RunInfo:
        """Write the start of a new run, or add a start to the ones before."""
        start = describe_start()
        tree = read_run_info(run) if resumed else {}
        known = {key: tree.get(key, start[key]) for key in OF_A_START}
        starts = tree.get("starts") or ([{key: tree[key] for key in OF_A_START if key in tree}] if tree else [])
        tree = {
            **known,
            "parameters": parameters,
            "data": tree.get("data") or data,
            "finished": False,
            "starts": [*starts, start | {"from_step": step, "to_step": step, "ended": None}],
        }
        info = cls(run, tree)
        info.write()
        return info

    def update(self, **figures: Any) -> None:
        """Amend this start, and write the file."""
        self.tree["starts"][-1] |= figures
        self.tree["finished"] = self.tree["starts"][-1]["ended"] == "finished"
        self.write()

    def write(self) -> None:
        """Replace the file."""
        text = json.dumps(self.tree, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.run / RUN_INFO, text.encode("utf-8", "backslashreplace"))


def describe_start() -> dict[str, Any]:
    """When, how, where and with which versions this process began."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(["moestro", *sys.argv[1:]]),
        "machine": machine.describe_machine().cpu,
        "versions": {"moestro": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def read_run_info(run: Path) -> dict[str, Any]:
    """The content of RUN/run.json, empty if there is none; raises `MoestroError` if it is damaged."""
    path = run / RUN_INFO
    try:
        tree = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise MoestroError(f"{path} is damaged: {error}") from error
    return tree if isinstance(tree, dict) else {}
