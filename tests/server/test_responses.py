"""`/v1/responses` as OpenAI's client sees it: the same answers as a chat's, in items, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from live import Live

from moestro.server.responses import ResponseBuilder, ResponsesRequest

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


def fold(events: list[Any]) -> dict[int, str]:
    """The text or the arguments of each item, from the deltas alone."""
    texts: dict[int, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            texts[event.output_index] = texts.get(event.output_index, "") + event.delta
    return texts


def written(item: Any) -> str:
    return item.arguments if item.type == "function_call" else item.content[0].text


def strip(items: list[Any]) -> list[dict[str, Any]]:
    """Items without their random names."""
    return [{k: v for k, v in item.model_dump().items() if k not in ("id", "call_id")} for item in items]


def test_a_response_says_what_a_chat_says(client: openai.OpenAI) -> None:
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    sampling: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "extra_body": {"seed": 3, "top_k": 40}}
    chat = client.chat.completions.create(model="tiny", messages=talk, max_tokens=9, **sampling)  # type: ignore
    reply = client.responses.create(
        model="tiny", instructions="be brief", input="the cat", max_output_tokens=9, **sampling
    )
    assert reply.output_text == chat.choices[0].message.content != ""
    assert (reply.status, reply.incomplete_details and reply.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert reply.usage is not None and chat.usage is not None and reply.store is False
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (chat.usage.prompt_tokens, 9)
    again = client.responses.create(model="tiny", input="the cat", max_output_tokens=1)
    assert again.usage is not None and again.usage.input_tokens < reply.usage.input_tokens


@pytest.mark.parametrize("kind", ["text", "thought", "call", "logprobs"])
def test_a_stream_brings_the_same_items(client: openai.OpenAI, live: Live, kind: str) -> None:
    settings: dict[str, Any] = {"model": "tiny", "input": "the cat", "max_output_tokens": 60, "extra_body": {"seed": 4}}
    if kind == "thought":
        think = str(live.service.tokenizer.think_id)
        settings |= {"extra_body": {"seed": 4, "logit_bias": {think: 100}}, "max_output_tokens": 5}
    if kind == "call":
        settings |= {"tools": [TOOL], "tool_choice": "required"}
    if kind == "logprobs":
        settings |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 6}
    whole = client.responses.create(**settings)
    events = list(client.responses.create(**settings, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{whole.status}"
    last = events[-1].response
    assert strip(last.output) == strip(whole.output) and last.usage.output_tokens == whole.usage.output_tokens
    assert fold(events) == {index: written(item) for index, item in enumerate(last.output)}
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert added == [item.id for item in done] == [item.id for item in last.output] and done == last.output
    assert whole.output[0].type == {"thought": "reasoning", "call": "function_call"}.get(kind, "message")
    if kind == "call":
        assert json.loads(whole.output[0].arguments)["a"] in (1, 2) and whole.status == "completed"
    if kind == "logprobs":
        scores = whole.output[0].content[0].logprobs
        assert len(scores) == 6 and all(len(score.top_logprobs) == 2 for score in scores)
        assert bytes(byte for score in scores for byte in score.bytes).decode("utf-8", "replace") == whole.output_text


def test_the_sdk_accumulates_a_stream_as_it_does_openais(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ["well done"]}}
    with client.responses.stream(model="tiny", input="the cat", extra_body=extra) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts[-1] == final.output_text == "well done"


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    schema = TOOL["parameters"]
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    reply = client.responses.create(model="tiny", input="x", text=form, max_output_tokens=60)
    assert json.loads(reply.output_text)["a"] in (1, 2) and reply.text is not None
    assert reply.status == "completed" and reply.text.format is not None and reply.text.format.type == "json_schema"


def test_what_comes_back_is_understood(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="tiny", input="x", tools=[TOOL], tool_choice={"type": "function", "name": "add"}, max_output_tokens=60
    )
    (call,) = first.output
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]
    items += [item.model_dump() for item in first.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "3"}]  # type: ignore[union-attr]
    second = client.responses.create(model="tiny", input=items, tools=[TOOL], max_output_tokens=4)
    items += [item.model_dump() for item in second.output]
    assert client.responses.create(model="tiny", input=items, max_output_tokens=1).status == "incomplete"


def test_items_become_messages() -> None:
    text = [{"type": "output_text", "text": "I ", "annotations": []}, {"type": "output_text", "text": "add."}]
    body = ResponsesRequest.model_validate(
        {
            "instructions": "i",
            "input": [
                {"role": "user", "content": "q"},
                {
                    "type": "reasoning",
                    "id": "r",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "easy"}],
                },
                {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": text},
                {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}", "status": "completed"},
                {"type": "function_call_output", "call_id": "c", "output": "2"},
                {"role": "assistant", "content": "2"},
                {"role": "assistant", "content": "done"},
            ],
        }
    )
    found = [(m.role, m.text, m.reasoning_content or "", len(m.tool_calls or ())) for m in body.chat.messages]
    assert found == [
        ("system", "i", "", 0),
        ("user", "q", "", 0),
        ("assistant", "I add.", "easy", 1),
        ("tool", "2", "", 0),
        ("assistant", "2", "", 0),
        ("assistant", "done", "", 0),
    ]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tokens": 3}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "c"}]}, "arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ],
)
def test_what_is_not_done_is_refused(live: Live, body: dict[str, Any], named: str) -> None:
    reply = live.http.post("/v1/responses", json={"input": "x", "max_output_tokens": 1, **body})
    assert reply.status_code == 400 and named in reply.json()["error"]["message"], reply.text


def test_a_failure_amid_a_stream_ends_it_as_failed(make_chunk: Callable[[str], dict[str, Any]]) -> None:
    builder = ResponseBuilder(ResponsesRequest.model_validate({"input": "x"}), "1", 0, "tiny")
    events = [*builder.start(), *builder.push(make_chunk("a")), *builder.fail("server_error", "broken")]
    assert events[-1]["type"] == "response.failed" and events[-1]["response"]["error"]["message"] == "broken"
    assert events[-2]["item"]["status"] == "incomplete" and events[-2]["item"]["content"][0]["text"] == "a"


@pytest.fixture
def make_chunk() -> Callable[[str], dict[str, Any]]:
    return lambda text: {"delta": {"content": text}, "logprobs": None, "finish_reason": None}
