"""`moestro generate`: where the text comes from, how it is sampled, what is told of the speed."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from command_line import Call, last_json

from moestro.engine.language_model import load


def test_the_text_may_be_given_in_each_way(call: Call, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = (("the cat",), ("--prompt", "the cat"), ("-",), ("--prompt", "-"))
    texts = []
    for way in ways:
        monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
        code, out, err = call("generate", tiny_run, *way, "--max-tokens", 5)
        assert code == 0 and out.startswith("the cat") and "tokens/s" in err
        texts.append(out)
    assert len(set(texts)) == 1
    assert call("generate", tiny_run, "--prompt", "-5 is", "--max-tokens", 2)[1].startswith("-5 is")


def test_speeds_are_told_to_people_and_programs(call: Call, tiny_run: Path) -> None:
    code, _, err = call("generate", tiny_run, "the cat", "--max-tokens", 5, "--quiet")
    assert (code, err) == (0, "")
    tree = last_json(call("generate", tiny_run, "the cat", "--max-tokens", 5, "--json"))
    assert tree["prompt_tokens"] == len(load(tiny_run).encode("the cat"))
    assert tree["prompt_tokens_per_second"] == pytest.approx(tree["prompt_tokens"] / tree["first_token_seconds"])
    assert tree["tokens_per_second"] > 0 and tree["tokens"] == len(tree["ids"]) == 5
    assert last_json(call("generate", tiny_run, "the cat", "--max-tokens", 1, "--json"))["tokens_per_second"] > 0


def test_a_text_is_sampled_as_the_directory_says_unless_flags_do(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_run / "checkpoints" / "step-00000012", model)
    path = model / "generation_config.json"

    def ids(*flags: object, **settings: object) -> list[int]:
        path.write_text(json.dumps({"do_sample": True, **settings}))
        return last_json(call("generate", model, "the cat", "--max-tokens", 12, "--json", *flags))["ids"]

    loaded = load(model)

    def expect(**settings: float) -> list[int]:
        return loaded.generate("the cat", max_tokens=12, **settings).ids  # type: ignore[arg-type]

    assert ids(temperature=1.5, top_p=1.0) == expect(temperature=1.5)
    assert ids(temperature=1.5, top_k=1) == expect()
    assert ids("--top-k", 3, "--seed", 4, temperature=1.5, top_p=1.0, top_k=1) == expect(
        temperature=1.5, top_k=3, seed=4
    )
    assert ids("--temperature", 0, temperature=1.5) == expect()
    penalised = ids("--repetition-penalty", 5, "--temperature", 0, temperature=1.5)
    assert penalised == expect(repetition_penalty=5.0) != expect()
    path.unlink()
    usual = last_json(call("generate", model, "the cat", "--max-tokens", 12, "--json"))["ids"]
    assert usual == expect(temperature=0.7, top_p=0.9)


@pytest.mark.parametrize("words", [(), ("a", "--prompt", "b"), ("a", "b")])
def test_there_is_exactly_one_text(call: Call, tiny_run: Path, words: tuple[str, ...]) -> None:
    code, out, err = call("generate", tiny_run, *words)
    assert (code, out) == (2, "") and err.count("\n") == 1


def test_a_terminal_gets_no_control_characters(call: Call, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.data.tokenizer.Tokenizer.decode_stream", lambda *_: iter(["a\x1b[2J", "\n\u202eb"]))
    assert "\x1b" in call("generate", tiny_run, "x", "--quiet")[1]
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    out = call("generate", tiny_run, "x\x07", "--quiet")[1]
    assert out == "x\\x07a\\x1b[2J\n\\u202eb\n"
