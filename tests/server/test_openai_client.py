"""The API as OpenAI's own client sees it; texts are those the engine computes alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from live import Live, MakeEngine, run_live

from moestro.data.template import encode_chat
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.events import Completion
from moestro.engine.language_model import LanguageModel
from moestro.engine.sequence import Request, SamplingParams

TALK = [{"role": "user", "content": "the cat sat on the mat"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2]}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "drop")
]  # fmt: skip


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(make_engine: MakeEngine, tokenizer: Tokenizer) -> Callable[..., list[Completion]]:
    """What an engine gives for a conversation, a text or ids, with nothing else in it."""

    def compute(prompt: str | list[int] | list[dict[str, str]], **params: Any) -> list[Completion]:
        if isinstance(prompt, str):
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        else:
            ids = encode_chat(prompt, tokenizer) if isinstance(prompt[0], dict) else prompt  # type: ignore
        return make_engine().run([Request(ids, SamplingParams(**params))])[0]

    return compute


Alone = Callable[..., list[Completion]]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "moestro"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_chat_says_what_the_engine_says(client: openai.OpenAI, alone: Alone, tokenizer: Tokenizer) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=TALK, max_completion_tokens=9, temperature=0.7, seed=3, n=2, top_p=0.9
    )
    expected = alone(TALK, max_tokens=9, temperature=0.7, seed=3, n=2, top_p=0.9)
    assert [choice.message.content for choice in reply.choices] == [tokenizer.decode(c.ids) for c in expected]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert [choice.finish_reason for choice in reply.choices] == ["length", "length"]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(encode_chat(TALK, tokenizer)), 18)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 18 and reply.object == "chat.completion"


def test_chat_streams_the_same(client: openai.OpenAI, alone: Alone, tokenizer: Tokenizer) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=TALK, max_tokens=12, seed=5, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    texts, reasons = ["", ""], {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert texts == [tokenizer.decode(c.ids) for c in alone(TALK, max_tokens=12, temperature=1.0, seed=5, n=2)]
    assert reasons == {0: "length", 1: "length"}
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 15
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24


def test_chat_logprobs(client: openai.OpenAI, alone: Alone, tokenizer: Tokenizer) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 6, "temperature": 0}
    reply = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    (expected,) = alone(TALK, max_tokens=6, logprobs=3)
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content is not None
    found = reply.choices[0].logprobs.content
    assert [entry.logprob for entry in found] == [score.logprob for score in expected.logprobs]
    assert [entry.bytes for entry in found] == [list(tokenizer.pieces[id]) for id in expected.ids]
    assert [[top.logprob for top in entry.top_logprobs] for entry in found] == [
        [logprob for _, logprob in score.top] for score in expected.logprobs
    ]
    streamed = [
        entry
        for chunk in client.chat.completions.create(**settings, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == found


def test_stops_are_cut_off_whole_and_streamed(client: openai.OpenAI, alone: Alone, tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(alone("the cat", max_tokens=24)[0].ids)
    stop = text[9:13]
    settings: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**settings, stop=["never", stop]).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.find(stop)], "stop")
    chunks = list(client.completions.create(**settings, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == "stop"
    (expected,) = alone("the cat", max_tokens=24)
    ended = client.completions.create(**settings, extra_body={"stop_token_ids": [expected.ids[4]]}).choices[0]
    assert ended.text == tokenizer.decode(expected.ids[: expected.ids.index(expected.ids[4])])
    assert ended.finish_reason == "stop"


def test_penalties_bias_and_extensions_reach_the_engine(
    client: openai.OpenAI, alone: Alone, tokenizer: Tokenizer
) -> None:
    settings: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": 1.0, "max_tokens": 10, "seed": 1}
    extras = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
    bias = {40: 4.0, 41: -100.0}
    found = client.completions.create(
        model="tiny", prompt="a dog", logit_bias={str(k): v for k, v in bias.items()}, extra_body=extras, **settings
    )
    (expected,) = alone("a dog", temperature=1.0, logit_bias=bias, **extras, **settings)
    assert found.choices[0].text == tokenizer.decode(expected.ids)
    unlike = client.completions.create(model="tiny", prompt="a dog", max_tokens=10, seed=1)
    assert unlike.choices[0].text != found.choices[0].text


@pytest.mark.parametrize("kind", ["text", "texts", "ids", "lists of ids"])
def test_completions_take_every_kind_of_prompt(
    client: openai.OpenAI, alone: Alone, tokenizer: Tokenizer, kind: str
) -> None:
    prompt: Any = {"text": "a cat", "texts": ["a cat", "moon"], "ids": [0, 9, 10], "lists of ids": [[0, 9], [30]]}[kind]
    prompts = [prompt] if kind in ("text", "ids") else prompt
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, seed=2)
    expected = [c for p in prompts for c in alone(p, max_tokens=5, temperature=1.0, n=2, seed=2)]
    assert [choice.text for choice in found.choices] == [tokenizer.decode(c.ids) for c in expected]
    assert [choice.index for choice in found.choices] == list(range(len(expected)))


def test_thoughts_come_under_both_names(client: openai.OpenAI, live: Live, tokenizer: Tokenizer) -> None:
    bias = {tokenizer.think_id: 100}
    message: Any = (
        client.chat.completions.create(
            model="tiny",
            messages=TALK,
            max_tokens=5,
            temperature=0,
            logit_bias=bias,  # type: ignore[arg-type]
        )
        .choices[0]
        .message
    )
    assert message.content == "" and message.reasoning_content == message.reasoning == "<think>" * 4
    body = {"messages": TALK, "max_tokens": 5, "temperature": 0, "logit_bias": {str(tokenizer.think_id): 100}}
    usage = live.http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5
    deltas: list[Any] = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(
            model="tiny",
            messages=TALK,
            max_tokens=5,
            temperature=0,
            logit_bias=bias,
            stream=True,  # type: ignore
        )
    ]
    thoughts = [delta.reasoning_content for delta in deltas if getattr(delta, "reasoning_content", None)]
    assert "".join(thoughts) == "<think>" * 4


def test_a_chat_ends_at_a_token_that_is_no_part_of_it(
    client: openai.OpenAI, alone: Alone, tokenizer: Tokenizer
) -> None:
    (expected,) = alone(TALK, max_tokens=9)
    end = expected.ids[5]
    choice = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=9, temperature=0, extra_body={"stop_token_ids": [end]}
    ).choices[0]
    assert choice.message.content == tokenizer.decode(expected.ids[: expected.ids.index(end)])
    assert choice.finish_reason == "stop"


def test_a_template_that_opens_a_thought_begins_with_reasoning(
    language_model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}<think>\n"
    opened = Tokenizer(tokenizer.specification, {"chat_template": template})
    opened.save(tmp_path)
    model = LanguageModel(language_model.model, opened, language_model.stop_ids)
    body: dict[str, Any] = {"messages": TALK, "max_tokens": 6, "temperature": 0}
    with run_live(
        lambda: Engine(model.runtime, model.tokenizer, model.stop_ids, memory_bytes=2**24), tmp_path / "tokenizer.json"
    ) as live:
        message = live.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert message["reasoning_content"] and message["content"] == ""
        body["logit_bias"] = {str(tokenizer.think_end_id): 100}
        message = live.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert "reasoning" not in message and message["content"] == "</think>" * 5
        body = {"messages": TALK, "max_tokens": 99, "response_format": {"type": "json_object"}, "seed": 1}
        message = live.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert message["content"].startswith("{") and "reasoning" not in message


def test_json_schemas_and_objects_are_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["kind", "legs"],
        "additionalProperties": False,
    }
    for seed in range(3):
        choice = client.chat.completions.create(
            model="tiny",
            messages=TALK,
            seed=seed,
            max_tokens=300,
            response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}},
        ).choices[0]
        tree = json.loads(choice.message.content or "")
        assert tree["kind"] in ("cat", "dog") and 0 <= tree["legs"] <= 9 and len(tree) == 2
        assert choice.finish_reason == "stop"
    text = (
        client.chat.completions.create(
            model="tiny", messages=TALK, seed=1, max_tokens=100, response_format={"type": "json_object"}
        )
        .choices[0]
        .message.content
    )
    assert (text or "").startswith("{")


@pytest.mark.parametrize("outputs", [{"regex": "[0-9]{3}-[a-c]+x"}, {"grammar": 'start: "12" ("a" | "b") "-x"'}])
def test_patterns_and_grammars_are_followed(client: openai.OpenAI, outputs: dict[str, str]) -> None:
    found = client.completions.create(
        model="tiny", prompt="a", max_tokens=120, seed=1, extra_body={"structured_outputs": outputs}
    ).choices[0]
    pattern = outputs.get("regex", "12[ab]-x")
    assert found.finish_reason == "length" or re.fullmatch(pattern, found.text)
    assert found.text[:2].isdigit()


@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"add", "drop"}), ({"type": "function", "function": {"name": "drop"}}, {"drop"})]
)
def test_forced_calls(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 200, "tools": TOOLS, "seed": 4}
    reply = client.chat.completions.create(**settings, tool_choice=choice).choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.content is None
    (call,) = reply.message.tool_calls or ()
    assert call.type == "function" and call.function.name in names
    assert json.loads(call.function.arguments)["a"] in (1, 2)
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, tool_choice=choice, stream=True)]
    (streamed,) = [call for delta in deltas for call in delta.delta.tool_calls or ()]
    assert streamed.function is not None and (streamed.index, streamed.function.name) == (0, call.function.name)
    assert streamed.function.arguments == call.function.arguments
    assert deltas[-1].finish_reason == "tool_calls"


def test_tools_that_are_not_called_leave_an_answer(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        reply = client.chat.completions.create(
            model="tiny",
            messages=TALK,
            max_tokens=4,
            tools=TOOLS,
            tool_choice=choice,
            seed=1,  # type: ignore
        ).choices[0]
        assert reply.message.tool_calls is None and reply.finish_reason == "length"


def test_errors_are_those_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "cat " * 2000}])
    assert caught.value.code == "context_length_exceeded" and "1024" in caught.value.message
