"""The commands, in the order in which they are used. What each one does is said by its function's docstring."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ListedCommand:
    """A command of a group, its function as MODULE:NAME in `moestro.cli`, and an example without `moestro`."""

    group: str
    name: str
    function: str
    example: str


MAKE, LOOK, USE, CHECK = "Make a model", "Look at it", "Use it", "Check"

COMMANDS = (
    ListedCommand(MAKE, "train", "train:train", "train --data texts --out runs/mine"),
    ListedCommand(MAKE, "compare", "compare:compare", "compare --routers dense,switch,deepseek-v3 --budget 5m"),
    ListedCommand(MAKE, "init", "init:init", "init --preset demo --out random"),
    ListedCommand(LOOK, "report", "report:report", "report runs/demo"),
    ListedCommand(LOOK, "inspect", "inspect:inspect", "inspect runs/demo"),
    ListedCommand(LOOK, "eval", "evaluate:evaluate", "eval runs/demo --json"),
    ListedCommand(LOOK, "ablate", "ablate:ablate", "ablate runs/demo --what top1,shared"),
    ListedCommand(USE, "chat", "chat:chat", "chat runs/demo"),
    ListedCommand(USE, "generate", "generate:generate", 'generate runs/demo "Once upon a time"'),
    ListedCommand(USE, "serve", "serve:serve", "serve runs/demo --port 8000"),
    ListedCommand(USE, "convert", "convert:convert", "convert runs/demo demo-fp8 --to fp8"),
    ListedCommand(USE, "pack", "pack:pack", "pack runs/demo --weights int8 --out demo-int8"),
    ListedCommand(CHECK, "settings", "settings:settings", "settings train.lr"),
    ListedCommand(CHECK, "doctor", "doctor:doctor", "doctor"),
)

GROUPS = (MAKE, LOOK, USE, CHECK)
