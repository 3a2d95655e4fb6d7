"""The files around a tokenizer, read as `transformers` 5 reads them.

    tokenizer.json             the vocabulary, how text is cut, and a post-processor: what stands around a prompt
    tiktoken.model             the same without the last, for Moonlight and Kimi-K2; see `tiktoken.py`
    tokenizer_config.json      names of special tokens, further added tokens, chat templates
    special_tokens_map.json    names, where tokenizer_config.json has no `added_tokens_decoder`
    chat_template.jinja, additional_chat_templates/NAME.jinja     templates, before those of tokenizer_config.json

`add_bos_token` counts for a tiktoken.model alone: beside a tokenizer.json, transformers 5 follows the post-processor,
and so does everything that reads prompts through it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moestro.data import tiktoken
from moestro.errors import DataError

NAME = "tokenizer.json"
TEMPLATE_NAME, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
MAX_TEMPLATES = 64
FILES = (NAME, tiktoken.NAME, "tokenizer_config.json", "special_tokens_map.json", TEMPLATE_NAME)
# what `save` wrote beside the template until prompts began to say themselves that BOS begins them
_OLD_KEYS = {"tokenizer_class", "bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token",
             "clean_up_tokenization_spaces"}  # fmt: skip


def find_file(path: Path) -> Path:
    """The vocabulary's file that a path means: the file, or the one in a directory or in the file's place."""
    if path.is_dir():
        path = path / NAME
    beside = path.with_name(tiktoken.NAME)
    return beside if path.name == NAME and not path.exists() and beside.exists() else path


def read_files(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json, and the configuration: names, templates, flags. DataError for damaged files."""
    configuration = _read_configuration(path.parent)
    if path.name == tiktoken.NAME:
        text = tiktoken.read_tiktoken(path, configuration)
        return text, configuration
    try:
        return path.read_text("utf-8"), configuration
    except OSError as error:
        raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error


def was_saved_without_bos(configuration: Mapping[str, Any]) -> bool:
    """Whether an earlier version of `Tokenizer.save` wrote this: its models expect BOS, though it says otherwise."""
    return (
        set(configuration) - {"chat_template"} == _OLD_KEYS
        and configuration["tokenizer_class"] == "PreTrainedTokenizerFast"
        and configuration["add_bos_token"] is configuration["add_eos_token"] is False
    )


def name_templates(value: object) -> dict[str, str]:
    """The templates of a `chat_template` entry by name: one is the default, a list or an object names several."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if not isinstance(value, dict):
        return {}
    return {name: text for name, text in value.items() if isinstance(name, str) and isinstance(text, str)}


def _read_configuration(folder: Path) -> dict[str, Any]:
    configuration = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in configuration:
        configuration |= _read_object(folder / "special_tokens_map.json")
    files = [folder / TEMPLATE_NAME, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))[:MAX_TEMPLATES]]
    templates = {
        "default" if file.name == TEMPLATE_NAME else file.stem: _read(file, lambda file: file.read_text("utf-8"))
        for file in files
        if file.is_file()
    }
    if templates:
        configuration["chat_template"] = templates
    return configuration


def _read_object(path: Path) -> dict[str, Any]:
    tree = _read(path, lambda path: json.loads(path.read_text("utf-8"))) if path.exists() else {}
    if not isinstance(tree, dict):
        raise DataError(f"{path} is not a JSON object")
    return tree


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
