"""Turns chat requests into input for the template; describes tools to the model, forces calls and reads them back.

Tools go into the template's own `tools` variable if it has one, else into a system message that asks for
`<tool_call>{"name": …, "arguments": …}</tool_call>`. Calls are read back in that form and, if the tokenizer has the
tokens for it, in DeepSeek's (V3 with a code block for the arguments, V3.1 without):

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME⏎```json⏎ARGUMENTS⏎```<｜tool▁call▁end｜>…
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>

If `tool_choice` is "required" or a name, a grammar makes the text one call.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from moestro.data.specials import CHAT_TEMPLATE
from moestro.data.tokenizer import Tokenizer
from moestro.engine.grammar import from_calls, from_choices, from_json_schema, from_lark, from_regex
from moestro.engine.stops import count_beginning
from moestro.errors import ConfigError
from moestro.server.body import is_text, refuse_constant
from moestro.server.schema import ChatRequest, Function, Message, Sampling, ToolCall, ToolChoice

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, CALL_SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
JSON_BEGIN, JSON_END = "<tool_call>", "</tool_call>"
TOOL_TOKENS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEP)
INSTRUCTIONS = """\
You can call these functions:
{tools}
To call one, write nothing but
<tool_call>
{{"name": "the function's name", "arguments": {{…}}}}
</tool_call>
with arguments that fit its parameters; several such blocks call several functions. Their results come back to you."""
_STRING_PART = re.compile(r'"|\\.|\\', re.DOTALL)  # what may end a string of JSON, or hide its end
# the two ways in which templates read arguments as an object, as transformers passes them
_TAKES_OBJECTS = re.compile(r"arguments['\"]?\]?\s*\|\s*(?:tojson|items)|arguments\s+is\s+mapping|\.items\(\)")
_MEMBER = re.compile(r'\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_FENCED = re.compile(r"\s*(?P<name>\S+)\s*```(?:json)?\n(?P<arguments>.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A function that the model wants to call; arguments are JSON as far as the model wrote JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_tree(self) -> dict[str, Any]:
        """OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def uses_tools(request: ChatRequest) -> bool:
    """Whether to tell the model about tools and look for its calls."""
    return bool(request.tools) and request.tool_choice != "none"


def spelled_ids(request: ChatRequest, tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens that mark calls; the text must include them if it is searched for calls."""
    if not uses_tools(request):
        return frozenset()
    return frozenset(tokenizer.specials[name] for name in TOOL_TOKENS if name in tokenizer.specials)


def forces_call(request: ChatRequest) -> bool:
    """Whether the text must be a call."""
    return request.tool_choice == "required" or isinstance(request.tool_choice, ToolChoice)


def template_input(request: ChatRequest, template: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and further variables for the template, with tools described in the way that it supports."""
    template = template or CHAT_TEMPLATE
    messages = [_plain_message(message, template) for message in request.messages]
    variables: dict[str, Any] = {**_effort(request, template), **(request.chat_template_kwargs or {})}
    if uses_tools(request):
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        if re.search(r"\btools\b", template):
            variables["tools"] = tools
        else:
            _instruct(messages, tools)
    return messages, variables


def _effort(request: ChatRequest, template: str) -> dict[str, Any]:
    """`reasoning_effort` under the names by which the template knows it. ConfigError if it knows none."""
    effort = request.reasoning_effort
    if effort is None:
        return {}
    known = {"reasoning_effort": effort, "enable_thinking": effort != "none", "thinking": effort != "none"}
    found = {name: value for name, value in known.items() if re.search(rf"\b{name}\b", template)}
    if not found:
        raise ConfigError("reasoning_effort is not supported: this model's chat template does not read it")
    return found


def template_messages(messages: Sequence[Message], template: str | None) -> list[dict[str, Any]]:
    """Messages alone."""
    return [_plain_message(message, template or CHAT_TEMPLATE) for message in messages]


def _plain_message(message: Message, template: str) -> dict[str, Any]:
    """A message as templates expect it. Calls and results become text for a template that does not know them."""
    role = "system" if message.role == "developer" else message.role
    knows_tools = "tool_calls" in template
    if role == "tool" and not knows_tools:
        return {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if role == "tool":
        plain["tool_call_id"] = message.tool_call_id or ""
    if message.name:
        plain["name"] = message.name
    thoughts = message.reasoning_content or message.reasoning
    if thoughts and role == "assistant":
        plain["reasoning_content"] = thoughts
    if message.tool_calls and knows_tools:
        plain["tool_calls"] = [_plain_call(call, template) for call in message.tool_calls]
        plain["content"] = message.text or None
    elif message.tool_calls:
        calls = (_spell_call(call.function.name, call.function.arguments) for call in message.tool_calls)
        plain["content"] = "\n".join([*([message.text] if message.text else []), *calls])
    return plain


def _plain_call(call: ToolCall, template: str) -> dict[str, Any]:
    """A call as the template expects it: arguments as JSON, or as an object for a template that takes them apart."""
    plain = call.model_dump()
    if _TAKES_OBJECTS.search(template):
        with suppress(ValueError, RecursionError):  # what is no JSON stays as it was written
            plain["function"]["arguments"] = json.loads(call.function.arguments)
    return plain


def _spell_call(name: str, arguments: str) -> str:
    return f'{JSON_BEGIN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{JSON_END}'


def _instruct(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = INSTRUCTIONS.format(tools=listed)
    system = next((message for message in messages if message["role"] == "system"), None)
    if system is None:
        messages.insert(0, {"role": "system", "content": text})
    else:
        system["content"] = f"{system['content']}\n\n{text}"


def chat_grammar(request: ChatRequest) -> str | None:
    """The grammar that the text must follow, None if any text will do. ConfigError for a bad grammar, or for two."""
    kind = request.response_format.type if request.response_format else "text"
    if (kind != "text") + forces_call(request) + (request.structured_outputs is not None) > 1:
        raise ConfigError("give only one of response_format, structured_outputs and a tool_choice that forces a call")
    if forces_call(request):
        return from_calls({function.name: function.parameters for function in _callable(request)})
    return text_grammar(request)


def text_grammar(request: Sampling) -> str | None:
    """The grammar that the text of either kind of completion must follow. ConfigError for a bad one, or for two."""
    tree = request.response_format.schema_tree if request.response_format else None
    outputs = request.structured_outputs
    if tree is not None and outputs is not None:
        raise ConfigError("give only one of response_format and structured_outputs")
    if tree is not None:
        return from_json_schema(tree)
    if outputs is None:
        return None
    if outputs.regex is not None:
        return from_regex(outputs.regex)
    if outputs.choice is not None:
        return from_choices(outputs.choice)
    if outputs.grammar is not None:
        return from_lark(outputs.grammar)
    return from_json_schema({"type": "object"} if outputs.json_schema is None else outputs.json_schema)


def _callable(request: ChatRequest) -> list[Function]:
    """The functions that a forced call may name."""
    choice = request.tool_choice
    functions = [tool.function for tool in request.tools or ()]
    return [f for f in functions if not isinstance(choice, ToolChoice) or f.name == choice.function.name]


class EndFinder:
    """Finds where a mark ends a call in a text that grows: the first mark that is not within a string of JSON."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._at = 0  # the text before was searched
        self._in_string = False

    def find(self, text: str) -> int:
        """The mark's place; -1 if it has not come yet."""
        while self._at < len(text):
            if self._in_string:
                found = _STRING_PART.search(text, self._at)
                self._at = found.end() if found else len(text)
                self._in_string = found is None or found[0] != '"'
                if found and found[0] == "\\":  # cut off: what it escapes is still to come
                    self._at -= 1
                    return -1
                continue
            end, quote = text.find(self.mark, self._at), text.find('"', self._at)
            if end >= 0 and (quote < 0 or end < quote):
                return end
            if quote < 0:
                self._at = max(self._at, len(text) - len(self.mark) + 1)
                return -1
            self._at, self._in_string = quote + 1, True
        return -1


class CallReader:
    """Finds calls in an answer as it is written: `push` gives text and calls in order.

    `is_call`: the whole text is one call without marks, forced by a grammar. A call that is cut short or cannot be read
    stays text.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_call: bool = False, many: bool = True) -> None:
        has_tokens = CALLS_BEGIN in tokenizer.specials
        self._begins = (JSON_BEGIN, CALLS_BEGIN) if has_tokens else (JSON_BEGIN,)
        self._is_call, self._many = is_call, many
        self._end: EndFinder | None = None  # finds the end of the current call; None between calls
        self._held = ""
        self.num_calls = 0

    def push(self, text: str) -> list[str | Call]:
        """What is settled now."""
        self._held += text
        found: list[str | Call] = []
        while not self._is_call and (part := self._next()) is not None:
            found.append(part)
        return [part for part in found if part]

    def finish(self) -> list[str | Call]:
        """The parts that are left."""
        found: list[str | Call] = []
        while self._end is not None and self._end.mark in self._held:  # a string that never ended hid it
            broken, mark, self._held = self._held.partition(self._end.mark)
            self._end = None
            found += [broken + mark, *self.push("")]
        held, self._held = self._held, ""
        call = read_call(held) if self._is_call else None
        left = held.replace(CALLS_END, "")
        if self.num_calls and not left.strip():
            return found
        return found + (self._count(call) if call else [left] if left else [])

    def _next(self) -> str | Call | None:
        """The next settled part, which may be empty; None if more text is needed."""
        if self._end is not None:
            place, length = self._end.find(self._held), len(self._end.mark)
            if place < 0:
                return None
            inside, whole, rest = self._held[:place], self._held[: place + length], self._held[place + length :]
            self._end, self._held = None, rest
            call = read_call(inside)
            return whole if call is None else next(iter(self._count(call)), "")
        places = [(place, begin) for begin in self._begins if (place := self._held.find(begin)) >= 0]
        if CALL_BEGIN in self._held and len(self._begins) > 1:
            places.append((self._held.find(CALL_BEGIN), CALL_BEGIN))
        if places:
            place, begin = min(places)
            before, self._held = self._held[:place], self._held[place:]
            self._end = EndFinder(JSON_END if begin == JSON_BEGIN else CALL_END)
            return self._between(before)
        count = count_beginning(self._held, [*self._begins, CALL_BEGIN, CALLS_END])
        settled, self._held = self._held[: len(self._held) - count], self._held[len(self._held) - count :]
        return self._between(settled) or None

    def _between(self, text: str) -> str:
        """The text between calls, or nothing if it is only white space."""
        text = text.replace(CALLS_END, "")
        return "" if self.num_calls and not text.strip() else text

    def _count(self, call: Call) -> list[str | Call]:
        self.num_calls += 1
        return [call] if self._many or self.num_calls == 1 else []


def read_call(text: str) -> Call | None:
    """The call in the text between two marks; None if it is not a call."""
    for mark in (JSON_BEGIN, CALLS_BEGIN, CALL_BEGIN):
        text = text.strip().removeprefix(mark)
    if CALL_SEP in text:
        kind, _, rest = text.partition(CALL_SEP)
        fenced = _FENCED.fullmatch(rest)
        return Call(fenced["name"], fenced["arguments"]) if fenced else Call(kind.strip(), rest.strip())
    try:
        tree = json.loads(text, parse_constant=refuse_constant)
        if not isinstance(tree, dict) or not isinstance(tree.get("name"), str) or "arguments" not in tree:
            return None
    except (ValueError, RecursionError):
        return None
    name, arguments = tree["name"], tree["arguments"]
    if not isinstance(arguments, str):
        arguments = dict(_written_members(text))["arguments"]
    return Call(name, arguments) if is_text(name) and is_text(arguments) else None


def _written_members(text: str) -> Iterator[tuple[str, str]]:
    """The members of a JSON object that is known to be valid: names, and values as they are written."""
    decoder, at = json.JSONDecoder(), 0
    while found := _MEMBER.match(text, at):
        _, at = decoder.raw_decode(text, found.end())
        yield json.loads(found[1]), text[found.end() : at]
