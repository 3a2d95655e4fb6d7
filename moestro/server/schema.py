"""What clients may send and what they get, in OpenAI's shapes. Every bound on a request is here.

Unknown fields are ignored, as compatible servers do: a chat template or a model path in a request has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moestro.engine.sequence import MAX_BIASES, MAX_N, MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS

MAX_BODY_BYTES = 4 * 2**20
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32 * 2**10
MAX_TEXT = MAX_BODY_BYTES
MAX_TOKENS = 2**21
MAX_MESSAGES, MAX_PARTS, MAX_CALLS = 4096, 64, 64
MAX_TOOLS, MAX_TOOL_CHARS = 128, 64 * 2**10
MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES, MAX_SCHEMA_CHARS = 32, 4096, 64 * 2**10
MAX_GRAMMAR_CHARS = 16 * 2**10
MIN_TEMPERATURE = 0.001  # dividing logits by less overflows
MIN_TOP_P = 1e-6  # less is 0 in single precision, and would keep no token

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=256)]
FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
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


class StreamOptions(Received):
    include_usage: bool = False


class StructuredOutputs(Received):
    """An extension like vLLM's: exactly one way of constraining the text."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=MAX_GRAMMAR_CHARS)
    grammar: str | None = Field(None, max_length=MAX_GRAMMAR_CHARS, description="Lark, as llguidance reads it")

    @model_validator(mode="after")
    def check(self) -> Self:
        """Require exactly one of the three, of bounded size."""
        if sum(value is not None for value in (self.json_schema, self.regex, self.grammar)) != 1:
            raise ValueError("give one of json, regex and grammar")
        check_tree(self.json_schema)
        return self


class Sampling(Received):
    """What both kinds of completion share."""

    model: Name | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=100, description="below 0.001 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="the likeliest token always stays")
    top_k: int | None = Field(None, ge=-1, le=2**31, description="extension; 0 and -1 keep all")
    min_p: float | None = Field(None, ge=0, le=1, description="extension")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="extension")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[BiasKey, Bias] | None = Field(None, max_length=MAX_BIASES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS, description="extension")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    return_routes: bool = Field(False, description="extension: the experts of every token, prompt included")
    token_details: bool = Field(False, description="extension: tokens with their experts in every chunk of a stream")

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

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_N)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]],
            Field(min_length=1, max_length=MAX_N),
        ]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    suffix: Text | None = None
    add_special_tokens: bool = Field(True, description=ADD_SPECIAL_TOKENS)
    parse_special: bool = Field(False, description=PARSE_SPECIAL)

    @model_validator(mode="after")
    def check(self) -> Self:
        """Refuse unsupported options rather than do something else."""
        if self.suffix:
            raise ValueError("suffix is not supported")
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
    type: Literal["text"]
    text: Text


class CalledFunction(Received):
    name: FunctionName
    arguments: Text


class ToolCall(Received):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Received):
    """One message; `reasoning` and `reasoning_content` are the same under two names."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_CALLS)
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


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
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        """Require a schema where one is announced."""
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[FunctionName, bool | int | float | Name | None] | None = Field(None, max_length=16)

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

    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = Field(True, description=ADD_SPECIAL_TOKENS)
    parse_special: bool = Field(False, description=PARSE_SPECIAL)
    add_generation_prompt: bool = True

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
