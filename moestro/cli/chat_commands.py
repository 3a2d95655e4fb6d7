"""What can be typed in `moestro chat` beside messages: lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

from moestro.cli.output import print_note
from moestro.engine.conversation import Conversation
from moestro.engine.sequence import SamplingParams
from moestro.errors import ConfigError, DataError

HELP = {
    "/help": "this list",
    "/set [NAME VALUE]": "change a setting for the next replies; alone, show them",
    "/system [TEXT]": "say how to behave; alone, no longer",
    "/retry": "another reply to the last message",
    "/clear": "start over; the system message stays",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a saved conversation",
    "/exit": "leave, as does Ctrl-D",
    '"""': "begins and ends a message of several lines",
}
ALIASES = {"/new": "/clear", "/quit": "/exit", "/bye": "/exit", "/?": "/help"}
NUMBERS = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "seed": int,
}
ROLES = ("system", "user", "assistant")


@dataclass
class ChatSession:
    """A conversation and whether the user wants to leave."""

    conversation: Conversation
    is_over: bool = field(default=False, init=False)

    def follow(self, line: str) -> str | None:
        """Do what a line says; returns a message to send, if it means one. ConfigError for what it cannot mean."""
        word, _, rest = line.partition(" ")
        name, rest = ALIASES.get(word, word), rest.strip()
        commands = {key.split()[0] for key in HELP if key.startswith("/")}
        if name not in commands:
            near = difflib.get_close_matches(name, commands, n=1)
            raise ConfigError(
                f"no command {word}" + (f"; did you mean {near[0]}?" if near else ""), hint="/help lists them"
            )
        return getattr(self, f"do_{name[1:]}")(rest)

    def do_help(self, rest: str) -> None:
        width = max(map(len, HELP))
        print_note("\n".join(f"{name:<{width}}  {meaning}" for name, meaning in HELP.items()))

    def do_exit(self, rest: str) -> None:
        self.is_over = True

    def do_clear(self, rest: str) -> None:
        self.conversation.messages = [m for m in self.conversation.messages if m["role"] == "system"]
        print_note("(a new conversation)")

    def do_system(self, rest: str) -> None:
        others = [m for m in self.conversation.messages if m["role"] != "system"]
        self.conversation.messages = [*([{"role": "system", "content": rest}] if rest else []), *others]

    def do_retry(self, rest: str) -> str:
        messages = self.conversation.messages
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            raise ConfigError("there is nothing to ask again yet")
        self.conversation.messages = messages[: asked[-1]]
        self.conversation.seed += 1  # the same one would give the same reply
        return messages[asked[-1]]["content"]

    def do_set(self, rest: str) -> None:
        name, value = [*rest.split(maxsplit=1), "", ""][:2]
        if not name:
            print_note("\n".join(f"{key} {self._show(key)}" for key in NUMBERS))
            return
        if name not in NUMBERS:
            raise ConfigError(f"no setting {name}; there are {', '.join(NUMBERS)}")
        try:
            number = NUMBERS[name](value)
        except ValueError as error:
            raise ConfigError(f"{name} needs a number, not '{value}'") from error
        check_setting(name, number)
        setattr(self.conversation, name, number)

    def _show(self, key: str) -> str:
        value = getattr(self.conversation, key)
        return "as the model's directory says" if value is None else f"{value:g}"

    def do_save(self, rest: str) -> None:
        path = name_file(rest)
        text = json.dumps({"messages": self.conversation.messages}, ensure_ascii=False, indent=2)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError as error:
            raise ConfigError(f"{path} exists; choose another name") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        print_note(f"(saved in {path})")

    def do_load(self, rest: str) -> None:
        path = name_file(rest)
        self.conversation.messages = read_messages(path)
        print_note(f"({len(self.conversation.messages)} messages of {path})")


def name_file(text: str) -> Path:
    """The path that is meant; ConfigError if there is none."""
    if not text:
        raise ConfigError("name a file, such as /save talk.json")
    return Path(text).expanduser()


def check_setting(name: str, number: float) -> None:
    """ConfigError for a number out of range."""
    if name == "max_tokens" and number < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {number}")
    SamplingParams(**{name: number})  # type: ignore[arg-type]


def read_messages(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation; DataError if it is none."""
    try:
        messages = json.loads(path.read_text("utf-8"))["messages"]
        found = [{"role": message["role"], "content": message["content"]} for message in messages]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a saved conversation") from error
    if any(message["role"] not in ROLES or not isinstance(message["content"], str) for message in found):
        raise DataError(f"{path} is not a saved conversation: a message has a role of {', '.join(ROLES)} and a text")
    return found
