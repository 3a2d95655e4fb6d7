"""Errors: the message for callers, the hint for the command line."""

from __future__ import annotations

import pickle
import sys

import pytest

from moestro import cli
from moestro.errors import ConfigError, MoestroError


def test_a_hint_is_for_the_command_line_alone() -> None:
    error = ConfigError("runs/x holds\n a run", hint="choose another --out")
    assert str(error) == "runs/x holds\n a run"
    assert error.command_line_text == "runs/x holds a run; choose another --out"
    assert MoestroError("empty").command_line_text == "empty"
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.hint) == (str(error), error.hint)


def test_the_command_line_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConfigError("runs/x holds a run", hint="choose another --out")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["moestro", "train"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "moestro: runs/x holds a run; choose another --out\n"
