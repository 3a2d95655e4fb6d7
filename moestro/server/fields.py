"""Every field that clients know, in one of three tables: honoured, harmless, refused. No field is ignored in silence.

Honoured are the fields of the models in `schema.py` and `responses.py`. Harmless ones cannot change an answer. Refused
ones would change it, so a request that gives one gets a 400, unless the value is one of those listed: they ask for
nothing but what is done anyway. Fields that no known client sends are ignored, as compatible servers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    {
        "user", "safety_identifier", "metadata",  # labels of the caller's own
        "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",  # prefixes are always cached
        "prediction",  # may only make an answer faster
        "service_tier", "priority", "request_id", "cache_salt",  # there is one queue, first come first served
        "moderation", "access_programs", "spaces_between_special_tokens",
    }
)  # fmt: skip

_TOOLS, _OUTPUTS, _TEXT = "use tools and tool_choice", "use structured_outputs", "only text is written"
_WHOLE = "the whole prompt is always used"
_TEMPLATE = "only the chat template writes special tokens"
_ENDS = "a text ends at its end token, or after max_tokens"

# field -> (values that ask for nothing, what to do instead or why not)
Refusals = Mapping[str, tuple[tuple[Any, ...], str]]
REFUSED: Refusals = {
    "functions": ((), _TOOLS),
    "function_call": ((), _TOOLS),
    "modalities": ((["text"],), _TEXT),
    "audio": ((), _TEXT),
    "store": ((False,), "nothing is kept after an answer"),
    "verbosity": (("medium",), "ask for it in the messages"),
    "web_search_options": ((), "the server fetches nothing"),
    "suffix": (("",), "ask for the tokens of infilling in the prompt"),
    "skip_special_tokens": ((True,), "use logprobs or token_details to see control tokens"),
    "use_beam_search": ((False,), "texts are sampled"),
    "length_penalty": ((0, 1), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "num_beams": ((1,), "texts are sampled"),
    "ignore_eos": ((False,), _ENDS),
    "min_tokens": ((0,), _ENDS),
    "min_new_tokens": ((0,), _ENDS),
    "allowed_token_ids": ((), "use logit_bias or structured_outputs"),
    "bad_words": (([],), "use logit_bias"),
    "bad_words_ids": (([],), "use logit_bias"),
    "logits_processors": (([],), "requests run no code"),
    "truncate_prompt_tokens": ((), _WHOLE),
    "prompt_logprobs": ((), "use echo with logprobs in /v1/completions"),
    "return_tokens_as_token_ids": ((False,), "use token_details"),
    "return_token_ids": ((False,), "use token_details"),
    "include_stop_str_in_output": ((False,), "choices[].stop_reason names the stop string"),
    "add_generation_prompt": ((True,), "an answer is always begun"),
    "continue_final_message": ((False,), "use /v1/completions to go on with a text"),
    "chat_template": ((), "templates come from the model's directory"),
    "documents": (([],), "write them into a message"),
    "mm_processor_kwargs": (({},), _TEXT),
    "guided_decoding_backend": ((), "there is one"),
    "guided_whitespace_pattern": ((), "JSON is written without white space"),
    "structural_tag": ((), _OUTPUTS),
    "regex": ((), _OUTPUTS),
    "ebnf": ((), _OUTPUTS),
    "grammar": ((), _OUTPUTS),
    "json_schema": ((), "use response_format or structured_outputs"),
    "typical_p": ((0, 1), "use top_p or min_p"),
    "tfs_z": ((1,), "use top_p or min_p"),
    "top_a": ((0,), "use min_p"),
    "mirostat": ((0,), "use top_p or min_p"),
    "dynatemp_range": ((0,), "use temperature"),
    "dry_multiplier": ((0,), "use repetition_penalty"),
    "xtc_probability": ((0,), "use min_p"),
    "repeat_penalty": ((1,), "it is called repetition_penalty"),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty"),
    "n_predict": ((), "it is called max_tokens"),
    "max_new_tokens": ((), "it is called max_tokens"),
    "lora_path": ((), "the model is served as it is"),
    "kv_transfer_params": ((), "there is one engine"),
    "logit_processor": ((), "requests run no code"),
}  # fmt: skip

# in `/v1/completions`
TEXT_REFUSED: Refusals = {
    **REFUSED,
    "tools": (([],), "use /v1/chat/completions"),
    "tool_choice": (("none", "auto"), "use /v1/chat/completions"),
    "reasoning_effort": ((), "use /v1/chat/completions"),
    "chat_template_kwargs": (({},), "use /v1/chat/completions"),
    "max_completion_tokens": ((), "it is called max_tokens"),
    "top_logprobs": ((0,), "it is called logprobs"),
}

# in `/v1/chat/completions`
CHAT_REFUSED: Refusals = {
    **REFUSED,
    "echo": ((False,), "use /v1/completions"),
    "best_of": ((1,), "ask for n and choose"),
    "max_output_tokens": ((), "it is called max_completion_tokens"),
    "parse_special": ((False,), _TEMPLATE),
    "add_special_tokens": ((False,), _TEMPLATE),
}

# in a message
MESSAGE_REFUSED: Refusals = {
    "function_call": ((), "use tool_calls"),
    "audio": ((), _TEXT),
    "prefix": ((False,), "use /v1/completions to go on with a text"),
    "partial": ((False,), "use /v1/completions to go on with a text"),
}

# in `/v1/responses`
RESPONSES_REFUSED: Refusals = {
    **REFUSED,
    "echo": ((False,), "use /v1/completions"),
    "best_of": ((1,), "a response is one answer"),
    "previous_response_id": ((), "nothing is kept after an answer: send the items of the conversation as input"),
    "conversation": ((), "nothing is kept after an answer: send the items of the conversation as input"),
    "prompt": ((), "no prompts are stored here: send instructions and input"),
    "background": ((False,), "answers are computed while the client waits"),
    "truncation": (("disabled",), _WHOLE),
    "background_options": (({},), "answers are computed while the client waits"),
    "image": ((), _TEXT),
    "context_management": (([],), _WHOLE),
    "max_tool_calls": ((), "it bounds tools that the server runs, and it runs none"),
    "parse_special": ((False,), _TEMPLATE),
    "add_special_tokens": ((False,), _TEMPLATE),
    "messages": ((), "it is called input"),
    "n": ((1,), "a response is one answer"),
    "max_tokens": ((), "it is called max_output_tokens"),
    "max_completion_tokens": ((), "it is called max_output_tokens"),
    "response_format": ((), "it is called text.format"),
    "reasoning_effort": ((), "it is called reasoning.effort"),
    "return_routes": ((False,), "use /v1/chat/completions"),
    "token_details": ((False,), "use /v1/chat/completions"),
}


class FieldError(ValueError):
    """A field at fault, where the validator sees the whole object."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def refuse_fields(body: Mapping[str, Any], refused: Refusals = REFUSED) -> None:
    """FieldError for the first field that would change the answer and cannot; a null asks for nothing."""
    for field, value in body.items():
        if field not in refused or value is None:
            continue
        neutral, instead = refused[field]
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
            raise FieldError(field, f"not supported: {instead}")
