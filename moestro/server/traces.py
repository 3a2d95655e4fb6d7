"""`POST /trace`: every token of a text with its experts, their weights, and how the model predicted it.

The chat page asks for it when an answer is opened token by token. The text is computed once more, a page of tokens
between two steps of the engine, so requests under way go on; one text at a time, and few may wait.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import Field

from moestro.data.tokenizer import Tokenizer
from moestro.engine.scheduler import QueueFullError
from moestro.engine.sequence import MAX_TOP_LOGPROBS
from moestro.engine.stops import Detokenizer
from moestro.engine.trace import TokenTrace, trace
from moestro.server.choices import name_token
from moestro.server.loads import layer_names
from moestro.server.schema import Received, TokenId
from moestro.server.service import Service

MAX_TRACED = 4096  # tokens: bounds the time, the memory of the cache and the size of the answer
MAX_WAITING = 8
DIGITS = 5


class TraceRequest(Received):
    """`POST /trace`: a text as token ids, and how many of the likeliest tokens to name in each place."""

    tokens: list[TokenId] = Field(min_length=1, max_length=MAX_TRACED)
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 5


class Tracing:
    """Traces texts one after another."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, asyncio.Lock()
        self._waiting = 0

    async def trace(self, body: TraceRequest) -> dict[str, Any]:
        """The answer's JSON. ConfigError for a text that the model cannot read, QueueFullError if many wait."""
        if self._waiting >= MAX_WAITING:
            raise QueueFullError(f"{self._waiting} texts wait to be traced already")
        self._waiting += 1
        try:
            async with self._lock:
                found = await self._compute(body)
        finally:
            self._waiting -= 1
        return await asyncio.to_thread(self._describe, found)

    async def _compute(self, body: TraceRequest) -> list[TokenTrace]:
        worker, found = self._service.worker, []
        chunks = trace(worker.engine.runtime, body.tokens, body.top_logprobs)
        while (chunk := await worker.call(lambda: next(chunks, None))) is not None:
            found += chunk
        return found

    def _describe(self, found: list[TokenTrace]) -> dict[str, Any]:
        config, tokenizer = self._service.config, self._service.tokenizer
        spelled = Detokenizer(tokenizer)
        tokens = [_describe_token(tokenizer, spelled, one) for one in found]
        shape = {"layers": layer_names(config), "num_experts": config.num_experts, "top_k": config.top_k}
        return {**shape, "vocab_size": config.vocab_size, "tokens": tokens}


def _describe_token(tokenizer: Tokenizer, spelled: Detokenizer, one: TokenTrace) -> dict[str, Any]:
    """A token's JSON; `text` is what it adds to the text, `name` tells it from all others."""
    tree: dict[str, Any] = {
        "id": one.token,
        "text": spelled.push(one.token),
        "name": name_token(tokenizer, one.token),
        "experts": one.ids.tolist(),
        "weights": [[round(weight, DIGITS) for weight in row] for row in one.weights.tolist()],
    }
    if one.prediction is None:
        return {**tree, "logprob": None, "rank": None, "entropy": None, "top": []}
    known = one.prediction
    top = [{"id": id, "name": name_token(tokenizer, id), "logprob": round(value, DIGITS)} for id, value in known.top]
    numbers = {"logprob": known.logprob, "rank": known.rank, "entropy": round(known.entropy, DIGITS)}
    return {**tree, **numbers, "top": top}
