"""Errors: the message for callers, the hint for the command line."""

from __future__ import annotations

import pickle
import sys

import pytest

from moestro import cli
from moestro.errors import ConfigError, MoestroError, notice


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


def test_a_notice_is_one_line_that_a_terminal_may_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        notice("a file named \x1b[2Jx\n is left out")
    assert [record.getMessage() for record in caplog.records] == ["a file named \\x1b[2Jx is left out"]
