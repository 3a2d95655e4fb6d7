"""--ignore-config-keys: commands refuse a key that nothing knows, and go on when they are told that it is nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import Call, last_json

MODEL = ("generate", "MODEL", "the cat", "--max-tokens", "2", "--json")
COMMANDS = {
    "generate": MODEL,
    "eval": ("eval", "MODEL", "--data", "builtin", "--max-tokens", "20", "--json"),
    "inspect": ("inspect", "MODEL", "--no-measure", "--json"),
    "pack": ("pack", "MODEL", "--out", "OUT", "--json"),
    "convert": ("convert", "MODEL", "OUT", "--to", "bf16", "--json"),
    "train": ("train", "--from", "MODEL", "--dry-run", "--json", "model.mtp_depth=0"),
}


@pytest.fixture
def odd(tiny_run: Path, tmp_path: Path) -> Path:
    """A checkpoint with two keys of unknown meaning in its config.json."""
    directory = tmp_path / "model"
    shutil.copytree(sorted((tiny_run / "checkpoints").glob("step-*"))[-1], directory)
    tree = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(tree | {"gate_scale": 3, "my_note": "x"}))
    return directory


def fill_in(words: tuple[str, ...], model: Path) -> list[str]:
    return [{"MODEL": str(model), "OUT": str(model.parent / "out")}.get(word, word) for word in words]


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_keys_are_refused_or_ignored(call: Call, odd: Path, name: str) -> None:
    words = fill_in(COMMANDS[name], odd)
    code, _, err = call(*words)
    assert code == 2 and err.count("\n") == 1
    assert "gate_scale, my_note" in err and "--ignore-config-keys" in err
    result = call(*words, "--ignore-config-keys", "gate_scale, my_note")
    last_json(result)
    if name in ("pack", "convert"):
        written = json.loads((odd.parent / "out" / "config.json").read_text())
        assert not {"gate_scale", "my_note"} & written.keys()
        last_json(call(*fill_in(MODEL, odd.parent / "out")))
