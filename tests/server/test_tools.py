"""Tools as the template is told of them, with or without a place for them, and calls replayed with their results."""

from __future__ import annotations

from typing import Any

import pytest

from moestro.errors import ConfigError
from moestro.server.schema import ChatRequest
from moestro.server.tools import template_input

TEMPLATE = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}"


def ask(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "q"}], **fields})


TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": {"type": "object"}}}


def test_tools_are_told_by_the_template_or_by_a_system_message() -> None:
    messages, variables = template_input(ask(tools=[TOOL]), TEMPLATE)
    assert messages == [{"role": "user", "content": "q"}]
    assert variables == {"tools": [TOOL]}
    messages, variables = template_input(ask(tools=[TOOL]), None)
    assert variables == {} and [m["role"] for m in messages] == ["system", "user"]
    assert '{"name": "add", "description": "sum", "parameters": {"type": "object"}}' in messages[0]["content"]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    messages, _ = template_input(ask(tools=[TOOL], messages=talk), None)
    assert messages[0]["content"].startswith("Be brief.\n\nYou can call")
    assert template_input(ask(tools=[TOOL], tool_choice="none"), None)[0] == [{"role": "user", "content": "q"}]


def test_calls_and_their_results_are_replayed() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "easy"},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    messages, _ = template_input(ask(messages=talk), TEMPLATE)
    assert messages[0]["content"] == "1+1?"
    assert messages[1] == {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "easy"}
    assert messages[2] == {"role": "tool", "content": "2", "tool_call_id": "c1"}
    messages, _ = template_input(ask(messages=talk), None)
    assert messages[1]["content"] == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert messages[2] == {"role": "user", "content": "<tool_response>\n2\n</tool_response>"}


@pytest.mark.parametrize(
    ("template", "is_object"),
    [
        ("{{ call.function.arguments | tojson }} tool_calls", True),
        ("tool_calls {% for k, v in call.arguments.items() %}{% endfor %}", True),
        ("tool_calls {% if call.arguments is mapping %}{% endif %}", True),
        ("tool_calls {{ '```json' + tool['function']['arguments'] + '```' }}", False),
    ],
)
def test_arguments_are_an_object_where_the_template_takes_them_apart(template: str, is_object: bool) -> None:
    for arguments, parsed in (('{"a": 1}', {"a": 1}), ("{cut o", "{cut o")):
        call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}
        messages, _ = template_input(ask(messages=[{"role": "assistant", "tool_calls": [call]}]), template)
        found = messages[0]["tool_calls"][0]["function"]["arguments"]
        assert found == (parsed if is_object else arguments)


def test_effort_reaches_the_template_under_its_own_name() -> None:
    for template, effort, expected in (
        ("{{ reasoning_effort }}", "low", {"reasoning_effort": "low"}),
        ("{% if enable_thinking %}", "none", {"enable_thinking": False}),
        ("{% if thinking %}", "high", {"thinking": True}),
    ):
        assert template_input(ask(reasoning_effort=effort), template)[1] == expected
    given = ask(reasoning_effort="high", chat_template_kwargs={"thinking": False})
    assert template_input(given, "{% if thinking %}")[1] == {"thinking": False}
    with pytest.raises(ConfigError, match="does not read it"):
        template_input(ask(reasoning_effort="low"), "{{ messages }}")
