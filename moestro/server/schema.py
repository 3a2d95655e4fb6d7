"""What clients may send and what they get, in OpenAI's shapes. Every bound on a request is here.

A null means what the field's absence means. Numbers and truth values are those of JSON: "1" and 1 are not true. What
becomes of fields that have no place here is written in `fields.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    field_validator,
    model_validator,
)

from moestro.engine.sequence import MAX_BIASES, MAX_N, MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS
from moestro.server.fields import CHAT_REFUSED, MESSAGE_REFUSED, REFUSED, TEXT_REFUSED, Refusals, refuse_fields

MAX_BODY_BYTES = 4 * 2**20
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32 * 2**10
MAX_TEXT = MAX_BODY_BYTES
MAX_TOKENS = 2**21
MAX_MESSAGES, MAX_PARTS, MAX_CALLS = 4096, 64, 2**14  # an answer has no more calls than that
MAX_TOOLS, MAX_TOOL_CHARS = 128, 64 * 2**10
MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES, MAX_SCHEMA_CHARS = 32, 4096, 64 * 2**10
MAX_GRAMMAR_CHARS = 16 * 2**10
MAX_CHOICES = 512
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
MIN_TEMPERATURE = 0.001  # dividing logits by less overflows
MIN_TOP_P = 1e-6  # less is 0 in single precision, and would keep no token


def check_number(value: object) -> object:
    """ValueError for what JSON does not call a number."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


Int = Annotated[int, BeforeValidator(check_number)]
Float = Annotated[float, BeforeValidator(check_number)]
Bool = Annotated[bool, Strict()]
LogprobCount = Annotated[Int | None, BeforeValidator(lambda value: None if value is False else value)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Name = Annotated[str, Field(max_length=256)]
FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
TokenId = Annotated[Int, Field(ge=0, lt=2**31)]
TemplateArguments = Annotated[dict[FunctionName, bool | int | float | Name | None], Field(max_length=16)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[Float, Field(ge=-100, le=100)]
BiasKey = Annotated[str, Field(pattern="^[0-9]{1,10}$")]


def check_tree(tree: object) -> None:
    """ValueError for JSON deeper, larger or longer than a schema may be, or with half a character. No recursion."""
    level: list[object] = [tree]
    nodes = chars = depth = 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        chars += sum(len(node.encode()) for node in level if isinstance(node, str))
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"nested deeper than {MAX_SCHEMA_DEPTH}")
        if nodes > MAX_SCHEMA_NODES or chars > MAX_SCHEMA_CHARS:
            raise ValueError(f"more than {MAX_SCHEMA_NODES} values or {MAX_SCHEMA_CHARS} characters")
        level = [child for node in level for child in _children(node)]


def _children(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        yield from node
        yield from node.values()
    elif isinstance(node, list):
        yield from node


ADD_SPECIAL_TOKENS = (
    "extension: the tokens that the model's directory puts around a text, such as the one that begins it"
)
PARSE_SPECIAL = "extension: special tokens spelled in a text are meant as such; else they are text"


class Received(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, body: Any) -> Any:
        """Leave out what is null."""
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class StreamOptions(Received):
    include_usage: Bool = False
    continuous_usage_stats: Literal[False] = False


class StructuredOutputs(Received):
    """An extension like vLLM's: exactly one way of constraining the text."""

    model_config = ConfigDict(extra="forbid")

    json_schema: dict[str, Any] | Annotated[str, Field(max_length=MAX_SCHEMA_CHARS)] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, max_length=MAX_GRAMMAR_CHARS)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = Field(None, max_length=MAX_GRAMMAR_CHARS, description="Lark, as llguidance reads it")
    disable_any_whitespace: Bool = Field(True, description="JSON never has white space between its parts")

    @model_validator(mode="after")
    def check(self) -> Self:
        """Require exactly one, of bounded size."""
        given = (self.json_schema, self.json_object, self.regex, self.choice, self.grammar)
        if sum(value is not None for value in given) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        check_tree(self.json_schema)
        return self


class JsonSchema(Received):
    name: Name | None = None
    tree: dict[str, Any] = Field(alias="schema")

    @field_validator("tree")
    @classmethod
    def check(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Bound the size before anything is compiled."""
        check_tree(tree)
        return tree


class ResponseFormat(Received):
    """What form the text must have. `schema` beside the type is what others send in place of `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    tree: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def check(self) -> Self:
        """Require a schema where one is announced, and none elsewhere."""
        check_tree(self.tree)
        given = [tree for tree in (self.json_schema, self.tree) if tree is not None]
        if self.type == "json_schema" and not given:
            raise ValueError("json_schema is missing")
        if len(given) > (self.type != "text") or (self.type == "json_object" and self.json_schema is not None):
            raise ValueError(f"this schema has no place in a response_format of type {self.type}")
        return self

    @property
    def schema_tree(self) -> dict[str, Any] | None:
        """The schema that the text must follow; None if any text will do."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return self.json_schema.tree
        return {"type": "object"} if self.tree is None else self.tree


class Sampling(Received):
    """What both kinds of completion share. `refused`: fields that are known and not done, see `fields.py`."""

    refused: ClassVar[Refusals] = REFUSED

    model: Name | None = None
    max_tokens: Int | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: Float | None = Field(None, ge=0, le=100, description="below 0.001 is greedy")
    top_p: Float | None = Field(None, ge=0, le=1, description="the likeliest token always stays")
    top_k: Int | None = Field(None, ge=-1, le=2**31, description="extension; 0 and -1 keep all")
    min_p: Float | None = Field(None, ge=0, le=1, description="extension")
    repetition_penalty: Float | None = Field(None, ge=0.01, le=100, description="extension")
    presence_penalty: Float | None = Field(None, ge=-2, le=2)
    frequency_penalty: Float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[BiasKey, Bias] | None = Field(None, max_length=MAX_BIASES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS, description="extension")
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Int | None = Field(None, ge=1, le=MAX_N)
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_routes: Bool = Field(False, description="extension: the experts of every token, prompt included")
    token_details: Bool = Field(False, description="extension: tokens with their experts in every chunk of a stream")

    @model_validator(mode="before")
    @classmethod
    def check_fields(cls, body: Any) -> Any:
        """Refuse what is known and not done; read vLLM's former `guided_…` fields as `structured_outputs`."""
        if not isinstance(body, dict):
            return body
        refuse_fields(body, cls.refused)
        guided = {key.removeprefix("guided_"): body[key] for key in GUIDED if body.get(key) is not None}
        if guided and body.get("structured_outputs") is not None:
            raise ValueError("give structured_outputs or one guided_ field")
        return {**body, "structured_outputs": guided} if guided else body

    @model_validator(mode="after")
    def check_stream(self) -> Self:
        """Refuse options of a stream without a stream, as OpenAI's API does."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    refused: ClassVar[Refusals] = TEXT_REFUSED

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_N)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]],
            Field(min_length=1, max_length=MAX_N),
        ]
    )
    echo: Bool | None = None
    logprobs: LogprobCount = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: Int | None = Field(None, ge=1, le=MAX_N)
    add_special_tokens: Bool = Field(True, description=ADD_SPECIAL_TOKENS)
    parse_special: Bool = Field(False, description=PARSE_SPECIAL)

    @model_validator(mode="after")
    def check(self) -> Self:
        """Refuse to draw more than are returned, and too many at once."""
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported beyond n")
        if len(self.prompts) * (self.n or 1) > MAX_N:
            raise ValueError(f"prompts times n may be at most {MAX_N}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Received):
    """A part of a message; a refusal is the text of one."""

    type: Literal["text", "refusal"]
    text: Text = Field(validation_alias=AliasChoices("text", "refusal"))


class CalledFunction(Received):
    """A call as the model wrote it, so its name may be anything."""

    name: Text
    arguments: Text


class ToolCall(Received):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Received):
    """One message; `reasoning` and `reasoning_content` are the same under two names.

    Whatever an answer of this server has, its message may have when it comes back.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_CALLS)
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def check_fields(cls, body: Any) -> Any:
        """Refuse what would be lost."""
        if isinstance(body, dict):
            refuse_fields(body, MESSAGE_REFUSED)
        return body

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


class Function(Received):
    name: FunctionName
    description: str | None = Field(None, max_length=MAX_TOOL_CHARS)
    parameters: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def check(cls, tree: dict[str, Any] | None) -> dict[str, Any] | None:
        """Bound the size as for any schema."""
        check_tree(tree)
        return tree


class Tool(Received):
    type: Literal["function"]
    function: Function


class NamedFunction(Received):
    name: FunctionName


class ToolChoice(Received):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    refused: ClassVar[Refusals] = CHAT_REFUSED

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Int | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: Bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: Bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        """Bound the total size of the tools, and allow only a choice among them."""
        tools = {tool.function.name for tool in self.tools or ()}
        if sum(len(tool.model_dump_json()) for tool in self.tools or ()) > MAX_TOOL_CHARS:
            raise ValueError(f"tools: more than {MAX_TOOL_CHARS} characters in all")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in tools:
            raise ValueError("tool_choice names a function that is not among the tools")
        if self.tool_choice == "required" and not tools:
            raise ValueError("tool_choice is 'required' and there are no tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class TokenizeRequest(Received):
    """`POST /tokenize`: a text, or messages as a chat would render them."""

    model: Name | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: Bool = Field(True, description=ADD_SPECIAL_TOKENS)
    parse_special: Bool = Field(False, description=PARSE_SPECIAL)
    add_generation_prompt: Bool = True

    @model_validator(mode="after")
    def check(self) -> Self:
        """Require one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Received):
    """`POST /detokenize`."""

    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)


class ErrorDetail(BaseModel):
    """What went wrong: a message for people, the kind, the field at fault if any, and a code for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail
