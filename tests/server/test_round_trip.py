"""What the server wrote is accepted when it comes back, as OpenAI's client sends it, for every kind of answer."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from live import Live

TALK: list[Any] = [{"role": "user", "content": "the cat sat"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"const": {"a": [1]}}}}
CALL = '<tool_call>{"name": "%s", "arguments": {}}</tool_call>'
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "nothing": {"max_tokens": 0},
    "scored": {"logprobs": True, "top_logprobs": 2},
    "routed": {"extra_body": {"return_routes": True, "token_details": True}},
    "cut short": {"stop": [" "], "temperature": 2},
    "object": {"response_format": {"type": "json_object"}, "max_tokens": 40},
    "call": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    "call of an odd name": {
        "tools": [TOOL],
        "extra_body": {"structured_outputs": {"choice": [CALL % "functions.é è"]}},
        "max_tokens": 200,
    },
    "text and calls": {
        "tools": [TOOL],
        "extra_body": {"structured_outputs": {"choice": ["so: " + (CALL % "add") * 4]}},
        "max_tokens": 400,
    },
    "half a call": {"tools": [TOOL], "extra_body": {"structured_outputs": {"choice": [CALL % "add"]}}, "max_tokens": 9},
    "thought": {"extra_body": {"structured_outputs": {"choice": ["<think>so</think>yes"]}}, "max_tokens": 60},
    "thought without an end": {"extra_body": {"structured_outputs": {"regex": "<think>a+"}}, "max_tokens": 30},
}


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


def merge(chunks: Any) -> dict[str, Any]:
    """A message put together from its deltas, with all that clients keep of them."""
    message: dict[str, Any] = {}
    deltas = [choice.delta.model_dump() for chunk in chunks for choice in chunk.choices]
    for name, value in (pair for delta in deltas for pair in delta.items()):
        if isinstance(value, str) and name != "role":
            message[name] = (message.get(name) or "") + value
        elif isinstance(value, list):
            message[name] = (message.get(name) or []) + value
        else:
            message.setdefault(name, value)
    return message


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_accepted_back(client: openai.OpenAI, kind: str, is_streamed: bool) -> None:
    settings: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "seed": 2, **KINDS[kind]}
    if is_streamed:
        message = merge(client.chat.completions.create(messages=TALK, stream=True, **settings))
    else:
        message = client.chat.completions.create(messages=TALK, **settings).choices[0].message.model_dump()
    assert message["role"] == "assistant"
    assert bool(message.get("tool_calls")) == (kind in ("call", "call of an odd name", "text and calls"))
    assert bool(message.get("reasoning_content")) == kind.startswith("thought")
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in message.get("tool_calls") or ()]
    reply = client.chat.completions.create(
        model="tiny", messages=[*TALK, message, *results, *TALK], max_tokens=1, tools=settings.get("tools", openai.omit)
    )
    assert reply.usage is not None and reply.usage.completion_tokens == 1


def test_parsed_messages_come_back_too(client: openai.OpenAI) -> None:
    ends: Any = {"structured_outputs": {"choice": ["yes"]}}
    reply = client.chat.completions.parse(model="tiny", messages=TALK, extra_body=ends)
    message: Any = reply.choices[0].message
    again = client.chat.completions.create(model="tiny", messages=[*TALK, message], max_tokens=1)
    assert again.choices[0].finish_reason == "length"


@pytest.mark.parametrize("fields", [{"function_call": {"name": "f", "arguments": "{}"}}, {"audio": {"id": "a"}}])
def test_what_would_be_lost_is_refused(live: Live, fields: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "x", **fields}
    reply = live.http.post("/v1/chat/completions", json={"messages": [*TALK, message], "max_tokens": 1})
    (name,) = fields
    assert reply.status_code == 400 and reply.json()["error"]["param"] == f"messages[1].{name}"


def test_cached_tokens_are_counted(live: Live) -> None:
    prompt = [33 + n % 200 for n in range(150)]
    body = {"prompt": prompt, "max_tokens": 2, "n": 2}

    def cached(**fields: Any) -> int:
        usage = live.http.post("/v1/completions", json={**body, **fields}).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached(), cached()] == [0, 128]  # two whole pages of 64
    assert cached(prompt=[prompt, prompt[:100], [34, *prompt]]) == 128 + 64
    assert cached(echo=True, logprobs=0) == 0  # its prompt is computed to be scored
