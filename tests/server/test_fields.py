"""Every field of OpenAI's own client is honoured, harmless or refused, and a null asks for nothing."""

from __future__ import annotations

from typing import Any

import pytest
from live import Live
from openai.types import completion_create_params as texts
from openai.types.chat import completion_create_params as chats
from openai.types.responses import response_create_params as responses

from moestro.server.fields import CHAT_REFUSED, HARMLESS, RESPONSES_REFUSED, TEXT_REFUSED
from moestro.server.responses import ResponsesRequest
from moestro.server.schema import ChatRequest, CompletionRequest

TALK = [{"role": "user", "content": "x"}]
KINDS: list[tuple[str, Any, Any, Any, dict[str, Any]]] = [
    ("/v1/chat/completions", ChatRequest, chats.CompletionCreateParamsBase, CHAT_REFUSED, {"messages": TALK}),
    ("/v1/completions", CompletionRequest, texts.CompletionCreateParamsBase, TEXT_REFUSED, {"prompt": "x"}),
    ("/v1/responses", ResponsesRequest, responses.ResponseCreateParamsBase, RESPONSES_REFUSED, {"input": "x"}),
]
VLLM = [
    "add_generation_prompt",
    "allowed_token_ids",
    "bad_words",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "include_stop_str_in_output",
    "length_penalty",
    "min_p",
    "min_tokens",
    "priority",
    "prompt_logprobs",
    "repetition_penalty",
    "request_id",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "structured_outputs",
    "top_k",
    "truncate_prompt_tokens",
    "use_beam_search",
]


def homes(field: str, model: Any, refused: Any) -> int:
    guided = field.startswith("guided_") and field in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    honoured = field in set(model.model_fields) - set(refused) or guided
    return honoured + (field in refused) + (field in HARMLESS - set(model.model_fields))


@pytest.mark.parametrize(("path", "model", "params", "refused", "body"), KINDS)
def test_every_field_of_the_client_is_in_one_table(
    path: str, model: Any, params: Any, refused: Any, body: dict[str, Any]
) -> None:
    fields = [*params.__annotations__, "stream", *VLLM]
    assert len(fields) > 17
    assert {field: homes(field, model, refused) for field in fields} == dict.fromkeys(fields, 1)


@pytest.mark.parametrize(("path", "model", "params", "refused", "body"), KINDS)
def test_null_is_as_if_a_field_were_absent(
    live: Live, path: str, model: Any, params: Any, refused: Any, body: dict[str, Any]
) -> None:
    nulls = dict.fromkeys([*model.model_fields, *refused, *HARMLESS], None)
    limit = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 2}
    plain = live.http.post(path, json={**body, **limit, "seed": 1}).json()
    found = live.http.post(path, json={**nulls, **body, **limit, "seed": 1}).json()
    assert found.get("usage", found)["total_tokens"] == plain["usage"]["total_tokens"]


@pytest.mark.parametrize(("path", "model", "params", "refused", "body"), KINDS)
def test_refused_fields_are_named_unless_they_ask_for_nothing(
    live: Live, path: str, model: Any, params: Any, refused: Any, body: dict[str, Any]
) -> None:
    limit = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 1}
    for field, (neutral, _) in refused.items():
        if field in limit:
            continue
        error = live.http.post(path, json={**body, **limit, field: "something"})
        assert error.status_code == 400 and error.json()["error"]["param"] == field, (field, error.text)
        for value in neutral:
            assert live.http.post(path, json={**body, **limit, field: value}).status_code == 200, (field, value)


@pytest.mark.parametrize(
    ("field", "values", "status"),
    [
        ("stream_options", [{"include_usage": None}, {"include_usage": True}, {"include_obfuscation": False}], 200),
        ("stream_options", [{"include_usage": "true"}, {"include_usage": 1}, {"continuous_usage_stats": True}], 400),
        ("max_tokens", [1, 1.0, None], 200),
        ("max_tokens", ["1", True, 1.5], 400),
        ("temperature", [0, 1.5], 200),
        ("temperature", ["1", False, []], 400),
        ("stop", [None, "a", []], 200),
        ("logit_bias", [{}, {"40": 1}], 200),
        ("logit_bias", [{"40": "1"}, []], 400),
    ],
)
def test_values_are_those_of_json(live: Live, field: str, values: list[Any], status: int) -> None:
    for value in values:
        reply = live.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True, field: value})
        assert reply.status_code == status, (value, reply.text)
    for value in ("true", 1, "yes"):
        assert live.http.post("/v1/completions", json={"prompt": "x", "stream": value}).status_code == 400


def test_logprobs_may_be_false(live: Live) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    assert live.http.post("/v1/completions", json={**body, "logprobs": False}).json()["choices"][0]["logprobs"] is None
    assert live.http.post("/v1/completions", json={**body, "logprobs": True}).status_code == 400


@pytest.mark.parametrize(
    ("path", "fields", "texts"),
    [
        ("/v1/completions", {"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ("/v1/completions", {"guided_regex": "a{3}"}, {"aaa"}),
        ("/v1/completions", {"guided_grammar": 'start: "b"'}, {"b"}),
        ("/v1/completions", {"guided_json": {"type": "null"}}, {"null"}),
        ("/v1/completions", {"structured_outputs": {"json": '{"const": 7}'}}, {"7"}),
        ("/v1/completions", {"structured_outputs": {"choice": ["one"]}}, {"one"}),
        ("/v1/completions", {"response_format": {"type": "json_object", "schema": {"const": {"a": 1}}}}, {'{"a":1}'}),
        ("/v1/chat/completions", {"response_format": {"type": "json_object", "schema": {"const": []}}}, {"[]"}),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "schema": {"const": []}}}, {"[]"}),
    ],
)
def test_every_way_of_asking_for_a_form_is_honoured(
    live: Live, path: str, fields: dict[str, Any], texts: set[str]
) -> None:
    reply = live.http.post(path, json={"prompt": "x", "messages": TALK, "max_tokens": 20, **fields})
    (choice,) = reply.json()["choices"]
    assert choice.get("text", choice.get("message", {}).get("content")) in texts


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": {}, "guided_regex": "a"},
        {"guided_regex": "a", "structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        {"response_format": {"type": "text", "schema": {}}},
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
    ],
)
def test_two_forms_at_once_are_refused(live: Live, fields: dict[str, Any]) -> None:
    assert live.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **fields}).status_code == 400
