"""`/v1/responses`: OpenAI's newer shape of a chat. A body becomes a `ChatRequest`, and a chat's chunks become items.

    body -> ResponsesRequest -> chat: ChatRequest -> (prepared as any chat) -> chunks -> ResponseBuilder -> events

Nothing is kept between requests: a conversation comes whole, as a list of items, those of former answers among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, PrivateAttr, ValidationError, model_validator

from moestro.engine.sequence import MAX_TOP_LOGPROBS
from moestro.server.fields import RESPONSES_REFUSED, Refusals
from moestro.server.schema import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKENS,
    MAX_TOOLS,
    Bool,
    ChatRequest,
    Effort,
    FunctionName,
    Int,
    LogprobCount,
    Name,
    Received,
    ResponseFormat,
    Sampling,
    TemplateArguments,
    Text,
)

LOGPROBS = "message.output_text.logprobs"
# What a chat request takes over by name.
SHARED = frozenset(Sampling.model_fields) | {"chat_template_kwargs", "parallel_tool_calls"}


class ItemPart(Received):
    """A part of an item's text."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: Text = Field(validation_alias=AliasChoices("text", "refusal"))


ItemText = Text | Annotated[list[ItemPart], Field(max_length=MAX_PARTS)]


class Item(Received):
    """An item of the input: a message, a thought, a call, or what a call gave."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: ItemText | None = None
    call_id: Name | None = None
    name: Text | None = None
    arguments: Text | None = None
    output: ItemText | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        """Require what an item of this type has."""
        wanted = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }.get(self.type, ())
        for name in wanted:
            if getattr(self, name) is None:
                raise ValueError(f"a {self.type} needs {name}")
        return self


class FlatTool(Received):
    """A function, described without the object around it that chats have."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FlatChoice(Received):
    type: Literal["function"]
    name: FunctionName


class TextOptions(Received):
    format: ResponseFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Received):
    """How much to think. Thoughts come whole, so a summary of them is not made."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(Sampling):
    """`POST /v1/responses`. `chat`: what it asks for, as a chat."""

    refused: ClassVar[Refusals] = RESPONSES_REFUSED

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Int | None = Field(None, ge=0, le=MAX_TOKENS)
    tools: list[FlatTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: Bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, max_length=2
    )
    top_logprobs: LogprobCount = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    metadata: dict[Name, Annotated[str, Field(max_length=512)]] | None = Field(None, max_length=16)
    chat_template_kwargs: TemplateArguments | None = None
    _chat: ChatRequest = PrivateAttr()

    @model_validator(mode="after")
    def make_chat(self) -> Self:
        """Require that it makes sense as a chat."""
        try:
            self._chat = ChatRequest.model_validate(self._chat_body())
        except ValidationError as error:
            raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None
        return self

    @property
    def chat(self) -> ChatRequest:
        """The same request as a chat."""
        return self._chat

    def _chat_body(self) -> dict[str, Any]:
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()]
        choice: Any = self.tool_choice
        if isinstance(choice, FlatChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        wants_logprobs = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        return {
            **{name: value for name, value in self.model_dump(by_alias=True).items() if name in SHARED},
            "stream_options": None,
            "messages": [*first, *_messages(items)],
            "max_tokens": self.max_output_tokens,
            "tools": tools or None,
            "tool_choice": choice,
            "logprobs": wants_logprobs,
            "top_logprobs": self.top_logprobs,
            "response_format": self.text and self.text.format and self.text.format.model_dump(by_alias=True),
            "reasoning_effort": self.reasoning and self.reasoning.effort,
        }


def _messages(items: list[Item]) -> Iterator[dict[str, Any]]:
    """Items as messages: thoughts, text and calls that follow each other are one message of the assistant."""
    held: dict[str, Any] | None = None
    for item in items:
        if item.type in ("reasoning", "function_call") or item.role == "assistant":
            if held is None or (held["content"] and item.role == "assistant"):
                yield from [held] if held else []
                held = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
            _extend(held, item)
            continue
        yield from [held] if held else []
        held = None
        if item.type == "function_call_output":
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _text_of(item.output)}
        else:
            yield {"role": item.role, "content": _text_of(item.content)}
    yield from [held] if held else []


def _extend(message: dict[str, Any], item: Item) -> None:
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        message["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})
    else:
        message["reasoning_content" if item.type == "reasoning" else "content"] += _text_of(item.content)


def _text_of(content: str | list[ItemPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class ResponseBuilder:
    """Makes a response from the chunks of a chat's one choice, and the events that tell a client of its growth."""

    def __init__(self, body: ResponsesRequest, id: str, created: int, model: str) -> None:
        self._body, self._id = body, id
        self._top = {"id": f"resp_{id}", "object": "response", "created_at": created, "model": model}
        self._items: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, str] | None = None
        self._is_open = False
        self._num_events = 0

    def start(self) -> list[dict[str, Any]]:
        """The events before the first token."""
        return [
            self._event("response.created", response=self.tree()),
            self._event("response.in_progress", response=self.tree()),
        ]

    def push(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a chunk."""
        delta, events = chunk["delta"], []
        scored = (chunk["logprobs"] or {}).get("content") or []
        if delta.get("reasoning_content"):
            events += self._write("reasoning", delta["reasoning_content"], [])
        elif delta.get("content") or scored:
            events += self._write("message", delta.get("content") or "", scored)
        for call in delta.get("tool_calls") or ():
            events += self._call(call)
        if chunk["finish_reason"]:
            self._status = "incomplete" if chunk["finish_reason"] == "length" else "completed"
        return events

    def finish(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """The last events. `usage` is a chat's."""
        self._usage = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
        events = self._close(self._status)
        return [*events, self._event(f"response.{self._status}", response=self.tree())]

    def fail(self, code: str, message: str) -> list[dict[str, Any]]:
        """The last events of a response that failed."""
        events = self._close("incomplete")
        self._status, self._error = "failed", {"code": code, "message": message}
        return [*events, self._event("response.failed", response=self.tree())]

    def tree(self) -> dict[str, Any]:
        """The response as it stands."""
        body = self._body
        given = body.model_dump(by_alias=True, include={"tools", "tool_choice", "reasoning"}, exclude_none=True)
        form = body.text and body.text.format
        return {
            **self._top,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": given.get("reasoning", {"effort": None, "summary": None}),
            "store": False,
            "temperature": body.chat.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_p": body.chat.top_p,
            "truncation": "disabled",
            "usage": self._usage,
        }

    def _write(self, kind: str, text: str, scored: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add text to the open item of a kind, or to a new one."""
        events = []
        if not (self._is_open and self._items[-1]["type"] == kind):
            if not text:
                return []
            events += self._open(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        more: dict[str, Any] = {}
        if kind == "message":
            part["logprobs"] = part["logprobs"] + scored
            more = {"logprobs": scored}
        name = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
        return [*events, self._event(name, **self._place(), content_index=0, delta=text, **more)]

    def _open(self, kind: str) -> list[dict[str, Any]]:
        events = self._close("completed")
        item: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            item |= {"id": f"msg_{self._id}_{len(self._items)}", "role": "assistant"}
        else:
            item |= {"id": f"rs_{self._id}_{len(self._items)}", "summary": list[str]()}
        self._items.append(item)
        self._is_open = True
        events.append(self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item)))
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part]
        added = self._event("response.content_part.added", **self._place(), content_index=0, part=dict(part))
        return [*events, added]

    def _close(self, status: str) -> list[dict[str, Any]]:
        """End the open item, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        (part,) = item["content"]
        is_message = item["type"] == "message"
        name = "response.output_text.done" if is_message else "response.reasoning_text.done"
        more = {"logprobs": part["logprobs"]} if is_message else {}
        return [
            self._event(name, **self._place(), content_index=0, text=part["text"], **more),
            self._event("response.content_part.done", **self._place(), content_index=0, part=part),
            self._event("response.output_item.done", output_index=len(self._items) - 1, item=item),
        ]

    def _call(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        """A call, which a chat delivers whole."""
        events, function = self._close("completed"), call["function"]
        item = {
            "id": f"fc_{self._id}_{len(self._items)}", "type": "function_call", "status": "completed",
            "call_id": call["id"], "name": function["name"], "arguments": function["arguments"],
        }  # fmt: skip
        self._items.append(item)
        begun, text = {**item, "status": "in_progress", "arguments": ""}, function["arguments"]
        return [
            *events,
            self._event("response.output_item.added", output_index=len(self._items) - 1, item=begun),
            self._event("response.function_call_arguments.delta", **self._place(), delta=text),
            self._event("response.function_call_arguments.done", **self._place(), name=item["name"], arguments=text),
            self._event("response.output_item.done", output_index=len(self._items) - 1, item=item),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": type, "sequence_number": self._num_events - 1, **fields}
