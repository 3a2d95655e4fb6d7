"""`moestro chat`: commands, messages of several lines, stopped replies, saved conversations, history."""

from __future__ import annotations

import io
import json
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Call, Result

from moestro.cli import history
from moestro.engine.language_model import LanguageModel

Talk = Callable[..., Result]


@pytest.fixture
def talk(call: Call, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """`talk("line", …)`: a chat in which these lines are typed."""
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, flags: tuple[object, ...] = ()) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        return call("chat", tiny_run, "--max-tokens", 6, *flags)

    return run


def saved(name: str = "talk.json") -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(Path(name).read_text("utf-8"))["messages"]
    return messages


def test_help_lists_every_command_and_exit_leaves(talk: Talk) -> None:
    code, out, err = talk("/help", "/exit", "never said")
    assert (code, out) == (0, "")
    assert all(name in err for name in ("/set", "/system", "/retry", "/clear", "/save", "/load", "/exit", '"""'))


def test_a_conversation_is_saved_and_taken_up_again(talk: Talk) -> None:
    assert talk("/system be brief", "the cat", "/save talk.json")[0] == 0
    first = saved()
    assert [message["role"] for message in first] == ["system", "user", "assistant"]
    assert first[1]["content"] == "the cat"
    talk("/load talk.json", "the dog", "/save more.json")
    assert saved("more.json")[:3] == first and saved("more.json")[3]["content"] == "the dog"
    code, _, err = talk("/save talk.json")
    assert code == 2 and "talk.json exists" in err and saved() == first
    talk("/load talk.json", "/clear", "/save cleared.json")
    assert saved("cleared.json") == first[:1]


def test_a_message_of_several_lines(talk: Talk) -> None:
    talk('"""the cat', "  sat", 'on"""', "/save talk.json")
    assert saved()[0]["content"] == "the cat\n  sat\non"
    talk('"""', "alone", '"""', '"""one line"""', "/save two.json")
    assert [message["content"] for message in saved("two.json")[::2]] == ["alone", "one line"]
    assert talk('"""never ended', "but said")[0] == 0


def test_retry_asks_again_with_another_seed(talk: Talk) -> None:
    talk("/set temperature 3", "the cat", "/save one.json", "/retry", "/save two.json")
    one, two = saved("one.json"), saved("two.json")
    assert one[0] == two[0] and one[1] != two[1] and len(two) == 2


def test_settings_are_shown_and_set(talk: Talk) -> None:
    _, out, err = talk("/set", "/set max_tokens 1", "/set temperature 0", "the", "/set")
    assert "max_tokens 6" in err and "temperature as the model's directory says" in err
    assert "max_tokens 1\ntemperature 0" in err and out.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/retry", "nothing to ask again"),
        ("/hlep", "did you mean /help"),
        ("/set colour red", "no setting colour"),
        ("/set temperature hot", "needs a number"),
        ("/set top_p 2", "top_p must lie in"),
        ("/set max_tokens 0", "at least 1"),
        ("/save", "name a file"),
        ("/load nowhere.json", "cannot be read"),
        ("/load bad.json", "not a saved conversation"),
        ("/load roles.json", "not a saved conversation"),
        ("the cat " * 200, "exceed"),
    ],
)
def test_mistakes_are_one_line(talk: Talk, line: str, named: str) -> None:
    Path("bad.json").write_text("[1]")
    Path("roles.json").write_text('{"messages": [{"role": "root", "content": "x"}]}')
    code, _, err = talk(line)
    assert code == 2 and named in err and err.count("\n") == 1


def test_a_stopped_reply_is_kept_with_its_question(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LanguageModel.stream_ids

    def interrupted(self: LanguageModel, *arguments: object, **settings: object) -> Iterator[int]:
        for place, id in enumerate(whole(self, *arguments, **settings)):  # type: ignore[arg-type]
            if place == 2:
                signal.raise_signal(signal.SIGINT)
            yield id

    monkeypatch.setattr(LanguageModel, "stream_ids", interrupted)
    code, out, err = talk("the cat", "/save talk.json")
    assert code == 0 and "stopped" in err
    question, answer = saved()
    assert question["content"] == "the cat" and answer["content"] == out.splitlines()[0] != ""


def test_a_full_context_forgets_the_oldest_and_says_so(talk: Talk) -> None:
    lines = [f"the cat sat on the mat {n} times and ran over the hill to the dog and the moon" for n in range(8)]
    code, _, err = talk(*lines, "/save talk.json")
    assert code == 0 and "oldest exchange" in err
    assert saved()[-2]["content"] == lines[-1] and len(saved()) < 16


def test_history_is_private_and_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    path = tmp_path / "state" / "moestro" / "chat_history"
    readline.clear_history()
    with history.line_editing():
        readline.add_history("the cat")
    assert path.read_text().splitlines()[-1] == "the cat"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    readline.clear_history()
    with history.line_editing():
        assert readline.get_history_item(readline.get_current_history_length()) == "the cat"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history.history_file() == Path.home() / ".local" / "state" / "moestro" / "chat_history"
