"""A conversation with a model: messages in, the ids of a reply out, token by token.

A model with a chat template of its own gets the messages through it. Any other is a base model, which was never trained
on conversations; it continues the text of all messages.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

from moestro.data.specials import CHAT_TEMPLATE
from moestro.data.template import encode_chat
from moestro.data.tokenizer import Tokenizer
from moestro.engine.defaults import Settings
from moestro.engine.language_model import LanguageModel

Render = Callable[[Sequence[Mapping[str, str]]], list[int]]
USUAL: Settings = {"temperature": 0.7, "top_p": 0.9}  # where neither the user nor the model's authors say


def is_base_model(tokenizer: Tokenizer) -> bool:
    """Whether a model came without a chat template: ours is written beside every model, trained on chats or not."""
    return tokenizer.chat_template in (None, CHAT_TEMPLATE)


def choose_settings(model: LanguageModel, **given: float | None) -> Settings:
    """How to sample: what is `given` (None: it is not), else what the model's authors recommend, else `USUAL`."""
    return {**USUAL, **model.defaults.choose(**given)}


@dataclass
class Conversation:
    """The messages so far and the sampling settings for replies; None: as the model's authors recommend, or `USUAL`.

    `plain`: continue the messages as one text instead of using the chat template. `num_forgotten` counts the exchanges
    that had to leave the context for the latest reply. `render` gives the ids of messages; by default the template runs
    in this process, with no bound on its time.
    """

    language_model: LanguageModel
    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    plain: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    num_forgotten: int = 0
    render: Render | None = None

    def reply(self, text: str) -> Generator[str, None, None]:
        """Say `text`; yield the reply piece by piece.

        The exchange is kept once the reply has ended or was closed, then with what was said of it until then. If it
        fails, nothing is kept.
        """
        asked, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        ids = self.language_model.stream_ids(prompt, **self._choose_settings(len(prompt)))
        pieces: list[str] = []
        try:
            for piece in self.language_model.tokenizer.decode_stream(ids):
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            self._keep(asked, pieces)
            raise
        self._keep(asked, pieces)

    def _keep(self, asked: list[dict[str, str]], pieces: list[str]) -> None:
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _choose_settings(self, prompt_tokens: int) -> Settings:
        model = self.language_model
        return choose_settings(
            model,
            max_tokens=min(self.max_tokens, max(model.context - prompt_tokens, 1)),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed + len(self.messages),
        )

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.plain and self.render is not None:
            return self.render(messages)
        if not self.plain:
            return encode_chat(messages, self.language_model.tokenizer)
        parts = [("" if m["role"] == "assistant" else "\n") + m["content"] for m in messages]
        return self.language_model.encode("".join(parts).removeprefix("\n"))

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages and their ids, the oldest exchanges left out until a reply fits behind them.

        A system message stays. So does the last message, even if that leaves no room for a reply.
        """
        limit = self.language_model.context - self.max_tokens
        prompt, self.num_forgotten = self._encode(messages), 0
        while len(prompt) > limit and sum(message["role"] == "user" for message in messages) > 1:
            first = next(i for i, message in enumerate(messages) if message["role"] == "user")
            messages = messages[:first] + messages[first + 2 :]
            prompt, self.num_forgotten = self._encode(messages), self.num_forgotten + 1
        return messages, prompt
