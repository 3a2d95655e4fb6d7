"""Names of the Hugging Face Hub: models that its cache holds, and downloads that the user asked for.

The cache is found where huggingface_hub has it (HF_HOME, HF_HUB_CACHE); HF_HUB_OFFLINE and HF_TOKEN hold, too. Only
weights, tokenizer and JSON are fetched: nothing that could be run.
"""

from __future__ import annotations

import re
from pathlib import Path

from moestro.errors import CheckpointError

FILES = ("*.safetensors", "*.json", "*.jinja", "tiktoken.model")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_hub_name(path: Path) -> bool:
    """Whether a path that does not exist could be a name such as deepseek-ai/DeepSeek-V2-Lite."""
    return bool(_NAME.fullmatch(path.as_posix())) and not path.parent.exists()


def find_cached(name: str) -> Path | None:
    """The directory of a model in the Hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def download(name: str) -> Path:
    """Fetch a model into the Hub's cache, or what is missing of it there; CheckpointError says why it failed."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # so are all of its own errors: no such name, no access, no network
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{name} could not be downloaded: {reason}") from error
