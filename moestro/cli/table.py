"""The commands, in the order in which they are used. What each one does is said by its function's docstring."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of a group, its function as MODULE:NAME in `moestro.cli`, and an example without `moestro`."""

    group: str
    name: str
    function: str
    example: str


MAKE, LOOK, USE, CHECK = "Make a model", "Look at it", "Use it", "Check"

COMMANDS = (
    Command(MAKE, "train", "train:train", "train --data texts --out runs/mine"),
    Command(MAKE, "compare", "compare:compare", "compare --routers dense,switch,deepseek-v3 --budget 5m"),
    Command(MAKE, "init", "init:init", "init --preset demo --out random"),
    Command(LOOK, "report", "report:report", "report runs/demo"),
    Command(LOOK, "inspect", "inspect:inspect", "inspect runs/demo"),
    Command(LOOK, "eval", "evaluate:evaluate", "eval runs/demo --json"),
    Command(LOOK, "ablate", "ablate:ablate", "ablate runs/demo --what top1,shared"),
    Command(USE, "chat", "chat:chat", "chat runs/demo"),
    Command(USE, "generate", "generate:generate", 'generate runs/demo "Once upon a time"'),
    Command(USE, "serve", "serve:serve", "serve runs/demo --port 8000"),
    Command(USE, "convert", "convert:convert", "convert runs/demo demo-fp8 --to fp8"),
    Command(USE, "pack", "pack:pack", "pack runs/demo --weights int8 --out demo-int8"),
    Command(CHECK, "settings", "settings:settings", "settings train.lr"),
    Command(CHECK, "doctor", "doctor:doctor", "doctor"),
)

GROUPS = (MAKE, LOOK, USE, CHECK)
