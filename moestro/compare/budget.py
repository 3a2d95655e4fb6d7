"""How long each run of a comparison lasts: equal time, equal tokens or equal FLOPs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from moestro.compare.cells import training_cost
from moestro.config import Config
from moestro.errors import ConfigError

Kind = Literal["seconds", "tokens", "flops"]
SECONDS = {"s": 1, "m": 60, "h": 3600}
TOKENS = {"tok": 1, "ktok": 10**3, "Mtok": 10**6, "Btok": 10**9}
FORMS = "10m, 90s, 1h (training time per run) or 500ktok, 20Mtok, 2Btok (tokens per run)"
MOST_STEPS = 10**7  # a budget of time lowers it
EVALUATIONS = 8


@dataclass(frozen=True)
class Budget:
    """What every run may spend: seconds of training, tokens, or training FLOPs; `text` is what the user wrote."""

    kind: Kind
    value: float
    text: str

    def train_keys(self, config: Config) -> dict[str, Any]:
        """The settings of `train` that spend it: about eight evaluations, a checkpoint in the middle and at the end.

        With a budget of time the number of steps is not known yet, so the base's intervals stay.
        """
        if self.kind == "seconds":
            return {"steps": MOST_STEPS, "minutes": self.value / 60, "keep_checkpoints": 1}
        train = config.train
        tokens = self.value if self.kind == "tokens" else self.value / training_cost(config)
        steps = max(1, round(tokens / (train.batch_size * train.seq_len * train.accumulate)))
        return {
            "steps": steps,
            "minutes": 0.0,
            "eval_every": math.ceil(steps / EVALUATIONS),
            "checkpoint_every": math.ceil(steps / 2),
            "keep_checkpoints": 1,
        }


def parse_budget(text: str, equal: str | None, base: Config) -> Budget:
    """The budget that `text` and `equal` name. Equal FLOPs are those of `base` over the tokens given.

    Raises `ConfigError` for any other form and if `equal` does not fit the unit of `text`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", text.strip())
    number, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if number <= 0 or (unit not in SECONDS and unit not in TOKENS):
        raise ConfigError(f"budget '{text}' is none of {FORMS}")
    if unit in SECONDS:
        if equal not in (None, "seconds"):
            raise ConfigError(f"equal {equal} needs a budget in tokens, such as 20Mtok, not {text}")
        return Budget("seconds", number * SECONDS[unit], text.strip())
    tokens = number * TOKENS[unit]
    match equal:
        case None | "tokens":
            return Budget("tokens", tokens, text.strip())
        case "flops":
            return Budget("flops", tokens * training_cost(base), text.strip())
        case "seconds":
            raise ConfigError(f"equal seconds needs a budget of time, such as 10m, not {text}")
    raise ConfigError(f"equal '{equal}' is none of tokens, seconds, flops")
