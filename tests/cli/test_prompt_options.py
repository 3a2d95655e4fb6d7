"""What the command line gives a model: special tokens where they are meant, templates only within bounds."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from command_line import Call, last_json

from moestro.engine.language_model import find_model_directory


@pytest.fixture
def model(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(find_model_directory(tiny_run), tmp_path / "model")


def test_special_tokens_in_a_prompt_can_be_meant(call: Call, model: Path) -> None:
    text = "a<｜User｜>b"
    plain = last_json(call("generate", model, text, "--max-tokens", 1, "--json"))
    meant = last_json(call("generate", model, text, "--max-tokens", 1, "--json", "--parse-special"))
    assert meant["prompt_tokens"] == 4 < plain["prompt_tokens"]


def test_a_template_runs_elsewhere_and_what_it_says_is_printable(
    call: Call, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = model / "chat_template.jinja"
    for source, expected in (("x{{ messages[0].content }}", 0), ("{{ raise_exception('\x1b[2Jno') }}", 2)):
        template.write_text(source)
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        code, _, err = call("chat", model, "--max-tokens", 2)
        assert code == expected, err
        assert "\x1b" not in err
        assert ("chat template: \ufffd[2Jno" in err) == (expected == 2)
