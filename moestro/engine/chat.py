"""A conversation with a model: messages in, the ids of a reply out, token by token.

A model whose tokenizer has no chat tokens, or that was never trained on conversations, simply continues the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moestro.data.chat import encode_chat
from moestro.engine.language_model import LanguageModel


@dataclass
class Conversation:
    """The messages so far, and how replies are sampled."""

    language_model: LanguageModel
    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, text: str) -> Iterator[str]:
        """Say `text`; yield the reply piece by piece. The exchange is kept once the reply has ended."""
        model = self.language_model
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(asked, model.tokenizer)
        room = model.model.config.max_seq_len - len(prompt)
        ids = model.stream_ids(
            prompt,
            max_tokens=min(self.max_tokens, max(room, 1)),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed + len(self.messages),
        )
        pieces = []
        for piece in model.tokenizer.decode_stream(ids):
            pieces.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
