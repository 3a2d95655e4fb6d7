"""What a model's directory says about writing with it: how to sample, and which ids end a text.

`generation_config.json` is read as vLLM reads it: its temperature, top-p, top-k, min-p and repetition penalty hold
where a user gives no value of their own. `do_sample: false` means that the file recommends no way of sampling.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypedDict, cast

from moestro.checkpoints.files import read_json
from moestro.errors import CheckpointError


class Settings(TypedDict, total=False):
    """The settings of `SamplingParams` that texts are usually written with."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


FILE = "generation_config.json"
# name -> the least and the largest value; the least of the second group is excluded
_RANGES: Final = {"temperature": (0.0, math.inf), "min_p": (0.0, 1.0)}
_ABOVE: Final = {"top_p": (0.0, 1.0), "repetition_penalty": (0.0, math.inf)}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How the authors of a model recommend to sample it; None where they recommend nothing. `top_k` 0 keeps all."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def choose(self, **given: float | None) -> Settings:
        """Settings to write with: what is `given`, else what is recommended; None means not given.

        A name that has neither is left out. `given` may hold other settings, too.
        """
        chosen = asdict(self) | {name: value for name, value in given.items() if value is not None}
        return cast(Settings, {name: value for name, value in chosen.items() if value is not None})


NO_DEFAULTS = GenerationDefaults()


def read_defaults(directory: Path) -> GenerationDefaults:
    """The recommendations of a directory's generation_config.json; CheckpointError for a value out of range."""
    path = directory / FILE
    tree = read_json(path) if path.exists() else {}
    if tree.get("do_sample") is False:
        return GenerationDefaults()
    values: dict[str, Any] = {}
    for name, (low, high) in (_RANGES | _ABOVE).items():
        if (value := tree.get(name)) is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or math.isinf(value) or (name in _ABOVE and value == low):
            raise CheckpointError(f"{path}: {name} is {value!r:.40}, which no text can be sampled with")
        values[name] = float(value)
    if (top_k := tree.get("top_k")) is not None:
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not -1 <= top_k < 2**31:
            raise CheckpointError(f"{path}: top_k is {top_k!r:.40}; it is a number of tokens")
        values["top_k"] = max(top_k, 0)
    if tree.get("do_sample") is True:
        values.setdefault("temperature", 1.0)
    return GenerationDefaults(**values)


def read_stop_ids(directory: Path, eos_id: int) -> frozenset[int]:
    """The ids that end a text: the tokenizer's EOS and those of generation_config.json, or else of config.json."""
    for name in (FILE, "config.json"):
        path = directory / name
        listed = read_json(path).get("eos_token_id") if path.exists() else None
        if listed is not None:
            break
    ids = listed if isinstance(listed, list) else [eos_id if listed is None else listed]
    if any(not isinstance(id, int) or isinstance(id, bool) for id in ids):
        raise CheckpointError(f"{path}: eos_token_id is {listed!r:.60}; it is an id, or a list of ids")
    return frozenset([eos_id, *ids])
