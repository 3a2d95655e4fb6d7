"""Templates are followed as transformers follows them, and messages cannot forge special tokens."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.data.specials import CHAT_TEMPLATE, SPECIALS
from moestro.data.template import encode_chat
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

TOKENIZER = Tokenizer.builtin()
CONVERSATION = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
    {"role": "user", "content": "안녕, and\n 3 * 3?"},
]
# What checkpoints bring: loops, namespaces, macros, trimming, JSON, a look for think tags.
FOREIGN = """{% set ns = namespace(n=0) %}
{% macro show(text) %}[{{ text | trim }}]{% endmacro %}
{{ bos_token }}
{% for m in messages %}
    {% set ns.n = ns.n + 1 %}
    {% if m.role == 'assistant' and '</think>' in m.content %}
{{ '<｜Assistant｜>' }}{{ m.content.split('</think>')[-1] }}{{ eos_token }}
    {% else %}
{{ '<｜User｜>' }}{{ show(m.content) }}{{ m | tojson }}{{ ns.n * 2 }}
    {% endif %}
{% endfor %}"""


def show(messages: list[dict[str, str]], **options: object) -> str:
    ids = encode_chat(messages, TOKENIZER, **options)  # type: ignore[arg-type]
    return TOKENIZER.decode(ids, skip_special=False)


def test_layout_of_the_default_template() -> None:
    assert show(CONVERSATION) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 2 + 2?<｜Assistant｜><think>\neasy\n</think>\n\n4"
        "<｜end▁of▁sentence｜><｜User｜>안녕, and\n 3 * 3?<｜Assistant｜>"
    )
    assert show(CONVERSATION[:1], add_generation_prompt=False).endswith("<｜User｜>What is 2 + 2?")
    ids = encode_chat(CONVERSATION, TOKENIZER)
    assert [id for id in ids if id < 7] == [0, 3, 4, 5, 6, 1, 3, 4]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, FOREIGN])
def test_ids_equal_those_of_transformers(tmp_path: Path, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        CONVERSATION, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert encode_chat(CONVERSATION, TOKENIZER, template) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([*SPECIALS, "<", "｜User｜>", "\ufdd0", "\ufdd1", "\ufdd0\ufdd1", "x", "\n"]),
        max_size=6,
    )
)
def test_messages_cannot_forge_specials(parts: list[str]) -> None:
    content = "".join(parts)
    ids = encode_chat([{"role": "user", "content": content}], TOKENIZER)
    assert [id for id in ids if id < 7] == [0, 3, 4]
    assert TOKENIZER.decode(ids) == content
    assistant = [{"role": "assistant", "content": content}]
    ids = encode_chat(assistant, TOKENIZER, add_generation_prompt=False)
    assert [id for id in ids if id in (0, 1, 3, 4)] == [0, 4, 1]
    assert TOKENIZER.decode(ids) == content


def test_halves_in_neighbouring_messages_do_not_join() -> None:
    halves = [{"role": "system", "content": "<｜Assis"}, {"role": "system", "content": "tant｜>"}]
    ids = encode_chat(halves, TOKENIZER, add_generation_prompt=False)
    assert [id for id in ids if id < 7] == [0]
    assert TOKENIZER.decode(ids) == "<｜Assistant｜>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 10**9 }}", "bounded"),
        ("{{ [0] * 99999999 }}", "bounded"),
        ("{{ '%99999999d' % 1 }}", "bounded"),
        ("{{ 'a' | center(99999999) }}", "center"),
        ("{% for a in range(999999999) %}{% endfor %}", "[Rr]ange"),
        ("{% for a in range(99999) %}{{ 'x' ~ messages[0].content }}{% endfor %}", "characters of output"),
        ("{% for a in 'ab' %}" * 5 + "{% endfor %}" * 5, "nested deeper"),
        ("{% for", "chat template: "),
        ("x" * 200_000, "longer than"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('only one system message') }}", "only one system message"),
    ],
)
def test_templates_are_bounded(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_chat([{"role": "user", "content": "y" * 200}], TOKENIZER, template)


@pytest.mark.parametrize("message", [{"role": "root", "content": "x"}, {"role": "user", "content": 3}, {}])
def test_bad_messages(message: dict[str, object]) -> None:
    with pytest.raises(DataError, match="needs a role"):
        encode_chat([message], TOKENIZER)


def test_role_without_a_place_in_the_template() -> None:
    with pytest.raises(DataError, match="no such role in this template: tool"):
        encode_chat([{"role": "tool", "content": "x"}], TOKENIZER)
