"""`moestro chat`: talk to a model in the terminal."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from moestro.cli.history import line_editing
from moestro.cli.models import Download, Model, choose_model
from moestro.cli.output import print_error, print_note, read_input
from moestro.cli.process import AS_RECOMMENDED, AS_STORED, Loading, MaxTokens, SamplingFlags, Threads, use_threads
from moestro.errors import MoestroError
from moestro.terminal import printable_lines

if TYPE_CHECKING:
    from moestro.engine.conversation import Conversation

BASE_MODEL = "This is a base model: it continues your text rather than answering it."
QUOTES = '"""'


def chat(
    model: Model = None,
    *,
    system: str | None = None,
    max_tokens: MaxTokens = 512,
    sampling: SamplingFlags = AS_RECOMMENDED,
    download: Download = False,
    loading: Loading = AS_STORED,
    threads: Threads = 0,
) -> None:
    """Talk to a model in the terminal; /help lists what can be typed beside messages.

    Ctrl-C stops a reply and keeps what was said of it, Ctrl-D leaves. What sampling settings are not given are those of
    the model's directory, or else a temperature of 0.7 and a top-p of 0.9.

    Parameters
    ----------
    system
        A first message that says how to behave.
    """
    from moestro.engine.conversation import Conversation, is_base_model
    from moestro.engine.language_model import find_model_directory
    from moestro.server.renderer import Renderer

    directory = choose_model(model, download, "chat")
    use_threads(threads)
    language_model = loading.load(directory)
    conversation = Conversation(
        language_model,
        max_tokens,
        **vars(sampling),
        plain=is_base_model(language_model.tokenizer),
        messages=[{"role": "system", "content": system}] if system else [],
    )
    if sys.stdin.isatty():
        print_note("/help lists commands; Ctrl-C stops a reply, Ctrl-D leaves.")
        if conversation.plain:
            print_note(BASE_MODEL)
    with closing(Renderer(find_model_directory(directory))) as renderer, line_editing():
        conversation.render = renderer.render
        converse(conversation)


def converse(conversation: Conversation) -> None:
    """Answer messages and follow commands until the input ends or /exit."""
    from moestro.cli.chat_commands import ChatSession

    session = ChatSession(conversation)
    while not session.is_over and (text := read_message()) is not None:
        try:
            question = session.follow(text) if text.startswith("/") else text
            if question:
                say(conversation, question)
        except MoestroError as error:  # of this message alone
            print_error(error)
            if not sys.stdin.isatty():
                raise SystemExit(2) from None


def say(conversation: Conversation, text: str) -> None:
    """Print the reply as it comes. Ctrl-C stops it between two tokens, so that the engine stays whole."""
    from moestro.training.signals import stop_on_signal

    with stop_on_signal() as stop:
        reply = conversation.reply(text)
        for place, piece in enumerate(reply):
            if not place and conversation.num_forgotten:
                print_note(f"(the context is full: the {conversation.num_forgotten} oldest exchanges are left out)")
            print(printable_lines(piece) if sys.stdout.isatty() else piece, end="", flush=True)
            if stop.signal is not None:
                break
        reply.close()
    print()
    if stop.signal not in (None, signal.SIGINT):  # SIGTERM, or the terminal has closed
        raise SystemExit(128 + stop.signal)
    if stop.signal is not None:
        print_note("(stopped; /retry asks again)")


def read_message() -> str | None:
    '''The next message, without spaces around it; lines between """ and """ are one. None at the end of input.'''
    try:
        text = read_line("> ").strip()
        return read_rest(text.removeprefix(QUOTES)) if text.startswith(QUOTES) else text
    except EOFError:
        if sys.stdin.isatty():
            print()  # leaves the prompt's line
        return None
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print_note("\n(Ctrl-D or /exit leaves)")
        return ""


def read_rest(text: str) -> str:
    """A message of several lines, of which the first is known, up to its quotes or the end of input."""
    while not text.rstrip().endswith(QUOTES):
        try:
            text += "\n" + read_line(". ")
        except EOFError:
            break
    return text.strip().removesuffix(QUOTES).strip()


def read_line(prompt: str) -> str:
    """A line of standard input; people see a prompt. EOFError at its end."""
    return read_input(lambda: input(prompt if sys.stdin.isatty() else ""))
