"""`moestro generate`: continue a text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moestro.cli.models import Download, Model, choose_model
from moestro.cli.output import print_json, print_note, read_input
from moestro.cli.process import AS_RECOMMENDED, AS_STORED, Loading, MaxTokens, SamplingFlags, Threads, use_threads
from moestro.errors import ConfigError
from moestro.terminal import printable_lines

if TYPE_CHECKING:
    from moestro.engine.engine import Engine


def generate(
    model: Model = None,
    text: str | None = None,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    max_tokens: MaxTokens = 128,
    sampling: SamplingFlags = AS_RECOMMENDED,
    parse_special: Annotated[bool, Parameter(negative="")] = False,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    download: Download = False,
    loading: Loading = AS_STORED,
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Continue a text.

    What sampling settings are not given are those of the model's directory, or else a temperature of 0.7 and a top-p of
    0.9, as in chat. The text comes as it is written; the speed is then told on standard error.

    Parameters
    ----------
    text
        The beginning of a text; "-" reads it from standard input.
    prompt
        The same, for a text that begins with a hyphen.
    parse_special
        Special tokens spelled in the text are meant as such; else they are text.
    quiet
        Do not tell the speed.
    json_output
        Print text, ids, tokens, finish_reason, prompt_tokens and the speeds as one JSON object.
    """
    from moestro.engine.conversation import choose_settings

    directory = choose_model(model, download, "generate")
    beginning = read_prompt(text, prompt)
    use_threads(threads)
    language_model = loading.load(directory)
    settings = choose_settings(language_model, max_tokens=max_tokens, **vars(sampling))
    written = Written(language_model.encode(beginning, parse_special=parse_special), language_model.engine)
    stream = written.follow(language_model.stream_ids(written.prompt, **settings))
    pieces = language_model.tokenizer.decode_stream(id for id in stream if id not in language_model.stop_ids)
    if json_output:
        print_json({"text": "".join(pieces), **written.report(language_model.stop_ids)})
    else:
        show(beginning, pieces, None if quiet else written)


@dataclass
class Written:
    """What follows a prompt, and when it came. The engine is made before the clock starts."""

    prompt: list[int]
    engine: Engine
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def follow(self, stream: Iterable[int]) -> Iterator[int]:
        """The stream, recorded."""
        for id in stream:
            self.ids.append(id)
            self.times.append(time.perf_counter())
            yield id

    def figures(self) -> dict[str, float]:
        """Speeds: of the prompt until the first token, and of the tokens after it (of the first if it is the only)."""
        start, first, *_ = self.times
        count, since = (len(self.ids) - 1, first) if len(self.ids) > 1 else (1, start)
        return {
            "first_token_seconds": first - start,
            "prompt_tokens_per_second": len(self.prompt) / (first - start),
            "tokens_per_second": count / (self.times[-1] - since),
        }

    def report(self, stop_ids: frozenset[int]) -> dict[str, Any]:
        """Everything but the text, for programs."""
        reason = "stop" if self.ids[-1] in stop_ids else "length"
        counts = {"tokens": len(self.ids), "prompt_tokens": len(self.prompt)}
        return {"ids": self.ids, "finish_reason": reason, **counts, **self.figures()}

    def describe(self) -> str:
        """The speeds for people."""
        figures = self.figures()
        return (
            f"{len(self.ids)} tokens, {figures['tokens_per_second']:,.1f} tokens/s; first token after "
            f"{figures['first_token_seconds']:.2f} s, prompt {figures['prompt_tokens_per_second']:,.0f} tokens/s"
        )


def read_prompt(text: str | None, prompt: str | None) -> str:
    """The one of both that is given; ConfigError unless it is exactly one."""
    if (text is None) == (prompt is None):
        wrong = "there is no text to continue" if text is None else "there are two texts to continue"
        raise ConfigError(wrong, hint='moestro generate MODEL "a text", or - to read it from standard input')
    given = text if text is not None else prompt
    assert given is not None
    return read_input(sys.stdin.read) if given == "-" else given


def show(beginning: str, pieces: Iterator[str], written: Written | None) -> None:
    """Print a text as it comes, once there is a first token, and its speed if `written` is given.

    A terminal gets nothing that it would obey.
    """
    spell = printable_lines if sys.stdout.isatty() else str
    for piece in chain([beginning + next(pieces)], pieces):
        print(spell(piece), end="", flush=True)
    print()
    if written is not None:
        print_note(written.describe())
