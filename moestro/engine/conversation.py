"""A conversation with a model: messages in, the ids of a reply out, token by token.

A model whose tokenizer has no chat tokens, or that was never trained on conversations, simply continues the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moestro.data.template import encode_chat
from moestro.engine.defaults import Settings
from moestro.engine.language_model import LanguageModel

USUAL: Settings = {"temperature": 0.7, "top_p": 0.9}  # where neither the user nor the model's authors say


@dataclass
class Conversation:
    """The messages so far and the sampling settings for replies; None: as the model's authors recommend, or `USUAL`."""

    language_model: LanguageModel
    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, text: str) -> Iterator[str]:
        """Say `text`; yield the reply piece by piece. The exchange is kept once the reply has ended."""
        model = self.language_model
        asked, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        chosen = model.defaults.choose(
            max_tokens=min(self.max_tokens, max(model.config.max_seq_len - len(prompt), 1)),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed + len(self.messages),
        )
        ids = model.stream_ids(prompt, **{**USUAL, **chosen})
        pieces = []
        for piece in model.tokenizer.decode_stream(ids):
            pieces.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages and their ids, the oldest exchanges left out until a reply fits behind them.

        A system message stays. So does the last message, even if that leaves no room for a reply.
        """
        limit = self.language_model.config.max_seq_len - self.max_tokens
        prompt = encode_chat(messages, self.language_model.tokenizer)
        while len(prompt) > limit and sum(message["role"] == "user" for message in messages) > 1:
            first = next(i for i, message in enumerate(messages) if message["role"] == "user")
            messages = messages[:first] + messages[first + 2 :]
            prompt = encode_chat(messages, self.language_model.tokenizer)
        return messages, prompt
