"""The special tokens of our own vocabularies, and the chat template (DeepSeek-R1's layout) that uses them."""

from __future__ import annotations

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THINK_END = "<think>", "</think>"
SPECIALS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, THINK_END)  # their ids are 0 to 6

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages if message['role'] == 'system' %}{{ message['content'] }}{% endfor %}
{%- for message in messages if message['role'] != 'system' %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('no such role in this template: ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
