"""The model behind the routes. Turns request bodies into engine requests and choices."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moestro.data.template import choose_template
from moestro.engine.defaults import NO_DEFAULTS, GenerationDefaults
from moestro.engine.engine import Engine
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import ConfigError, MoestroError
from moestro.server.choices import ChatChoice, ChatForm, Choice, Format, TextChoice
from moestro.server.loads import LoadHistory, layer_names
from moestro.server.metrics import Metrics
from moestro.server.renderer import Renderer
from moestro.server.schema import MIN_TEMPERATURE, MIN_TOP_P, ChatRequest, CompletionRequest, Sampling, TokenizeRequest
from moestro.server.tools import (
    chat_grammar,
    forces_call,
    spelled_ids,
    template_input,
    template_messages,
    text_grammar,
    uses_tools,
)
from moestro.server.worker import EngineWorker

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
# what holds where neither a request nor the model's directory gives a value; the first two are OpenAI's
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class ContextLengthError(ConfigError):
    """Prompt and continuation do not fit the model."""


class UnknownModelError(MoestroError):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class PreparedRequest:
    """The engine requests of a body and the parts of its answer. `kind`: OpenAI's name for the answer's object."""

    body: Sampling
    kind: str
    requests: list[Request]
    choices: list[Choice]
    begun: float
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_prompt_tokens(self) -> int:
        """How many tokens all prompts have."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def num_cached(self) -> int:
        """How many of them were found in the cache; of several choices the first computes the prompt."""
        return sum(choice.num_cached for choice in self.choices[:: self.body.n or 1])


class Service:
    """One model, its engine's thread, its template's process, and its metrics.

    `defaults`: how the model is sampled where a request does not say.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        tokenizer_path: Path,
        name: str,
        *,
        defaults: GenerationDefaults = NO_DEFAULTS,
    ) -> None:
        self.worker = EngineWorker(make_engine)
        engine = self.worker.engine
        self.tokenizer, self.config, self.context = engine.tokenizer, engine.runtime.config, engine.room.context
        self.name, self.created, self.defaults = name, int(time.time()), defaults
        self.renderer = Renderer(tokenizer_path)
        self.metrics = Metrics(layer_names(self.config))
        self.loads = LoadHistory(self.config)
        self._longest = max(map(len, self.tokenizer.pieces))
        self._template_thread = ThreadPoolExecutor(1, "template")

    def close(self) -> None:
        """End the engine's thread and the template's process."""
        self.worker.stop()
        self.renderer.close()
        self._template_thread.shutdown()

    def check_model(self, name: str | None) -> None:
        """UnknownModelError for another model's name; a request need not name any."""
        if name and name != self.name:
            raise UnknownModelError(f"there is no model '{name[:256]}' here, only '{self.name}'")

    async def prepare_text(self, body: CompletionRequest) -> PreparedRequest:
        """Prepare a body of `/v1/completions`. ConfigError and DataError for what cannot be done."""
        begun = time.monotonic()
        self.check_model(body.model)
        n = body.n or 1
        self.worker.check_room(len(body.prompts) * n)
        prompts = await asyncio.to_thread(self._encode_all, body.prompts, body)
        grammar = await asyncio.to_thread(text_grammar, body)
        wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        requests = []
        for ids in prompts:
            room = self._room(len(ids), wanted)
            scored = body.logprobs if body.echo else None
            requests.append(Request(ids, self._params(body, room, body.logprobs, scored, grammar)))
        form = Format(self.tokenizer, body.logprobs is not None, body.token_details)
        choices: list[Choice] = [
            TextChoice(place * n + index, form, ids if body.echo else None)
            for place, ids in enumerate(prompts)
            for index in range(n)
        ]
        return PreparedRequest(body, "text_completion", requests, choices, begun)

    async def prepare_chat(self, body: ChatRequest) -> PreparedRequest:
        """Prepare a body of `/v1/chat/completions`."""
        begun = time.monotonic()
        self.check_model(body.model)
        n = body.n or 1
        self.worker.check_room(n)
        self._check_chars(sum(len(message.text) for message in body.messages))
        grammar = await asyncio.to_thread(chat_grammar, body)
        template = choose_template(self.tokenizer, has_tools=uses_tools(body))
        ids = await self._render(*template_input(body, template))
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        room = self._room(len(ids), asked)
        top = (body.top_logprobs or 0) if body.logprobs else None
        form = ChatForm(
            self.tokenizer,
            bool(body.logprobs),
            body.token_details,
            has_tools=uses_tools(body),
            is_call=forces_call(body),
            many_calls=body.parallel_tool_calls is not False,
            thinks=grammar is None and self._thinks(ids),
        )
        choices: list[Choice] = [ChatChoice(index, form) for index in range(n)]
        params = self._params(body, room, top, None, grammar)
        request = Request(ids, replace(params, spelled_ids=spelled_ids(body, self.tokenizer)))
        return PreparedRequest(body, "chat.completion", [request], choices, begun)

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        """Ids of a text or of a conversation, as the other routes would compute them."""
        self.check_model(body.model)
        if body.messages is None:
            assert body.prompt is not None
            return await asyncio.to_thread(self._encode, body.prompt, body)
        messages = template_messages(body.messages, self.tokenizer.chat_template)
        return await self._render(messages, {}, body.add_generation_prompt)

    async def _render(
        self, messages: list[dict[str, Any]], variables: dict[str, Any], add_generation_prompt: bool = True
    ) -> list[int]:
        """Render in a separate thread, so that slow templates do not use up the threads of others."""

        def render() -> list[int]:
            return self.renderer.render(messages, variables, add_generation_prompt=add_generation_prompt)

        return await asyncio.get_running_loop().run_in_executor(self._template_thread, render)

    def _encode_all(self, prompts: Sequence[str | list[int]], body: CompletionRequest) -> list[list[int]]:
        """Encode each text; ids are taken as they are."""
        return [self._encode(prompt, body) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _encode(self, text: str, body: CompletionRequest | TokenizeRequest) -> list[int]:
        self._check_chars(len(text))
        special = {"add_special_tokens": body.add_special_tokens, "parse_special": body.parse_special}
        return self.tokenizer.encode_prompt(text, **special)

    def _check_chars(self, count: int) -> None:
        """Refuse, before encoding, text that no encoding can make short enough."""
        if count > self.context * self._longest:
            raise ContextLengthError(f"a prompt of {count} characters is longer than the model's context")

    def _room(self, num_prompt: int, wanted: int | None) -> int:
        """How many tokens to write: `wanted`, else all that fit. ContextLengthError if it does not fit."""
        longest = self.context
        room = longest - num_prompt
        if room < (1 if wanted is None else wanted):
            asked = "" if wanted is None else f" and {wanted} to write"
            limited = self.config.max_seq_len > longest
            raise ContextLengthError(
                f"this model's context is {longest} tokens; the prompt has {num_prompt} tokens{asked}"
                + f"; the model takes {self.config.max_seq_len} if the server is given room for them" * limited
            )
        return room if wanted is None else wanted

    def _thinks(self, ids: list[int]) -> bool:
        """Whether a prompt ends with an open `<think>`, as R1's template makes it."""
        begin, end = self.tokenizer.think_id, self.tokenizer.think_end_id
        tail = ids[-4:]
        if begin is None or begin not in tail:
            return False
        return end not in tail[tail.index(begin) :]

    def _params(
        self, body: Sampling, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None, grammar: str | None
    ) -> SamplingParams:
        """A body's sampling settings, with the model's defaults where it has none, and a new seed without a seed."""
        given = {name: getattr(body, name) for name in DEFAULTS}
        chosen: dict[str, Any] = {**DEFAULTS, **self.defaults.choose(**given)}
        is_greedy = chosen["temperature"] < MIN_TEMPERATURE
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if is_greedy else chosen["temperature"],
            top_k=max(chosen["top_k"], 0),
            top_p=max(chosen["top_p"], MIN_TOP_P),
            min_p=chosen["min_p"],
            repetition_penalty=chosen["repetition_penalty"],
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(id): bias for id, bias in (body.logit_bias or {}).items()},
            stop_ids=frozenset(body.stop_token_ids or ()),
            stop=body.stops,
            seed=secrets.randbits(62) if body.seed is None else body.seed % 2**62,
            n=body.n or 1,
            logprobs=0 if logprobs is None and body.token_details else logprobs,
            prompt_logprobs=prompt_logprobs,
            return_routes=body.return_routes,
            return_text=True,
            grammar=grammar,
        )
