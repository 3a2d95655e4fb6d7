"""From text and time to a model and a length of training, and what that will cost.

The rule. A model is trained on `TOKENS_PER_PARAMETER` tokens for each active parameter (see `sizes.py`). Of all depths,
the largest is taken whose tokens this machine computes in the minutes given, and whose tokens are at most `FEW_PASSES`
over the text: up to about four passes are worth nearly as much as new text, beyond sixteen little is learned
(Muennighoff et al., arXiv 2305.16264). Training then fills the minutes, up to four passes over the text; where even the
smallest model wants more tokens than that, up to sixteen. The vocabulary is the largest power of two that leaves
`BYTES_PER_ID` of text for each id, from 512 to 8192.

All functions here but `measure_text` are pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moestro.config import Config, ModelConfig, build_config
from moestro.data.survey import Survey
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError
from moestro.model.size import Size, training_flops
from moestro.sizes import (
    DEFAULT_MINUTES,
    MAX_DEPTH,
    MIN_DEPTH,
    MIN_STEPS,
    TOKENS_PER_PARAMETER,
    active_parameters,
    tree_of_depth,
)

FEW_PASSES, MOST_PASSES = 4, 16
BYTES_PER_ID = 500
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 512, 8192
SPARSE_VOCABULARY = 4  # times what the text supports
MANY_HOURS = 100
FEW_HELD_OUT = 2000  # tokens
EVALUATIONS = 20  # of a run, on the way
EVAL_TOKENS = 16384  # of a domain, on the way


@dataclass(frozen=True)
class TextSize:
    """About how many tokens a source gives with its tokenizer, and how many are held out by domain.

    `complete` is False where they are those of the beginning of a stream.
    """

    train: int
    held_out: dict[str, int]
    bytes_per_token: float
    vocabulary: int
    complete: bool = True


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will do: steps, tokens, passes over the text (None: its size is not known), seconds on this
    machine and tokens per second (None: not measured)."""

    text: TextSize
    size: Size
    steps: int
    tokens: int
    passes: float | None
    seconds: float | None
    tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """A tree for `--json`."""
        return {
            "text_tokens": self.text.train,
            "held_out_tokens": sum(self.text.held_out.values()),
            "steps": self.steps,
            "tokens": self.tokens,
            "passes": self.passes,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def choose_vocabulary(survey: Survey) -> int:
    """Ids for this much text; the most for a stream."""
    size = SMALLEST_VOCABULARY
    while size < LARGEST_VOCABULARY and (2 * size * BYTES_PER_ID <= survey.bytes or not survey.complete):
        size *= 2
    return size


def choose_depth(tokens: float, flops: float, vocabulary: int) -> int:
    """The largest depth whose `TOKENS_PER_PARAMETER` tokens are at most `tokens` and cost at most `flops`.

    At least the smallest depth.
    """
    fitting = MIN_DEPTH
    for depth in range(MIN_DEPTH, MAX_DEPTH + 1):
        config = build_config(fit_tree(depth, vocabulary))
        wanted = TOKENS_PER_PARAMETER * count_active(config.model)
        if wanted > tokens or wanted * training_flops(config.model, config.train.seq_len) > flops:
            break
        fitting = depth
    return fitting


def most_steps(active: int, text_tokens: float, tokens_per_step: int, *, fill: bool) -> int:
    """Steps beyond which a model of `active` parameters gains little from this text, at least `MIN_STEPS`.

    `fill`: a model with less than `TOKENS_PER_PARAMETER` in the text goes on up to `FEW_PASSES` all the same.
    """
    tokens = min(TOKENS_PER_PARAMETER * active, MOST_PASSES * text_tokens)
    if fill:
        tokens = max(tokens, FEW_PASSES * text_tokens)
    return max(round(tokens) // tokens_per_step, MIN_STEPS)


def tokens_per_step(config: Config) -> int:
    """Of all processes together."""
    train = config.train
    return train.batch_size * train.seq_len * train.accumulate


def measure_text(survey: Survey, config: Config, tokenizer: Tokenizer | None) -> TextSize:
    """Count tokens on the survey's sample; without a tokenizer, one is trained on three quarters of the sample."""
    counted, trained = survey.sample, config.model.vocab_size
    if tokenizer is None:
        rest = [text for number, text in enumerate(survey.sample) if number % 4]
        counted = survey.sample[::4] if rest and survey.bytes > sum(map(len, rest)) * 2 else survey.sample
        tokenizer = Tokenizer.train(rest if counted is not survey.sample else survey.sample, trained)
    num_bytes = sum(len(text.encode()) for text in counted)
    num_tokens = sum(map(len, tokenizer.encode_batch(counted)))
    ratio = num_bytes / max(num_tokens, 1)
    tokens = {name: domain.bytes / ratio + 2 * domain.documents for name, domain in survey.domains.items()}
    fraction = config.data.valid_fraction
    held_out = {name: held_out_tokens(tokens[name], survey, name, fraction) for name in tokens}
    return TextSize(
        round(sum(tokens.values())) - sum(held_out.values()), held_out, ratio, tokenizer.vocab_size, survey.complete
    )


def refuse_little(text: TextSize, config: Config) -> None:
    """Raise `DataError` for a text that is clearly less than one batch; where it is close, training will tell."""
    train = config.train
    if text.complete and text.train * 1.2 < train.batch_size * train.seq_len:
        raise DataError(
            f"about {text.train:,} tokens to train on are less than one batch of {train.batch_size} x {train.seq_len}: "
            "give more text, or lower train.batch_size or train.seq_len"
        )


def held_out_tokens(tokens: float, survey: Survey, name: str, fraction: float) -> int:
    """About how many of a domain's tokens are held out: its fraction, at least one document, none of a single text."""
    domain = survey.domains[name]
    if not domain.varied:
        return 0
    return round(tokens * max(fraction, 1 / domain.documents))


def evaluation_tokens(config: Config, text: TextSize, steps: int) -> int:
    """Tokens of all evaluations of a run: those on the way on at most `train.eval_tokens` a domain, the last on all."""
    some = sum(min(tokens, config.train.eval_tokens) for tokens in text.held_out.values())
    return some * ((steps - 1) // config.train.eval_every) + sum(text.held_out.values())


def plan_training(config: Config, text: TextSize, size: Size, step_seconds: float | None) -> TrainingPlan:
    """What `config` will do: its steps, or as many as its minutes allow."""
    per_step, steps = tokens_per_step(config), config.train.steps
    seconds = speed = None
    if step_seconds is not None:
        speed = per_step / step_seconds
        if config.train.minutes:
            # as the loop does: an evaluation is a forward pass, about a third of a step per token
            some = sum(min(tokens, config.train.eval_tokens) for tokens in text.held_out.values())
            with_evaluations = step_seconds + some / config.train.eval_every / 3 / speed
            steps = max(min(steps, int(config.train.minutes * 60 / with_evaluations)), 1)
        seconds = steps * step_seconds + evaluation_tokens(config, text, steps) / 3 / speed
    tokens = steps * per_step
    passes = tokens / max(text.train, 1) if text.complete else None
    return TrainingPlan(text, size, steps, tokens, passes, seconds, speed)


def warn(plan: TrainingPlan, config: Config, survey: Survey) -> list[str]:
    """What will disappoint, one line each."""
    found = []
    text = plan.text
    if plan.passes is not None and plan.passes > FEW_PASSES:
        found.append(
            f"{plan.passes:.0f} passes over little text: beyond {FEW_PASSES}, a model learns it by heart more than it "
            "learns from it; more text helps, or fewer steps"
        )
    bare = [name for name, tokens in text.held_out.items() if not tokens]
    if len(bare) == len(text.held_out):
        found.append("nothing is held out, since there is one document only: no score will say how good the model is")
    elif bare:
        found.append(f"nothing is held out of {', '.join(bare[:5])}: one document only")
    elif sum(text.held_out.values()) < FEW_HELD_OUT:
        found.append(
            f"about {sum(text.held_out.values()):,} tokens are held out, too few for a score that means much; "
            "data.valid_fraction holds out more"
        )
    supported = choose_vocabulary(survey)
    if trains_tokenizer(config) and config.model.vocab_size > SPARSE_VOCABULARY * supported:
        found.append(
            f"a vocabulary of {config.model.vocab_size} is more than {survey.bytes / 1e6:.2f} MB of text support: "
            f"try model.vocab_size={supported}"
        )
    if plan.seconds is not None and plan.seconds > MANY_HOURS * 3600:
        found.append(
            f"{plan.seconds / 3600:,.0f} hours ({plan.seconds / 86400:,.0f} days) on this machine: train.minutes "
            "limits them, and a smaller model needs fewer"
        )
    return found


def trains_tokenizer(config: Config) -> bool:
    """Whether the vocabulary is made from the text."""
    choice = config.data.tokenizer
    return choice == "train" or (choice == "auto" and config.data.source != "builtin")


def fit_tree(depth: int, vocabulary: int) -> dict[str, Any]:
    """The raw configuration of a depth that trains for `DEFAULT_MINUTES`, with as many ids."""
    tree = tree_of_depth(depth)
    tree["model"]["vocab_size"] = vocabulary
    tree["train"]["minutes"] = DEFAULT_MINUTES
    return tree


def pace(config: Config, steps: int) -> dict[str, int]:
    """How often a run of about so many steps is evaluated and saved, and a warm-up that it has time for."""
    every = max(steps // EVALUATIONS, min(25, steps))
    warmup = min(config.train.warmup_steps, max(steps // 10, 1))
    return {"eval_every": every, "checkpoint_every": every, "eval_tokens": EVAL_TOKENS, "warmup_steps": warmup}


def count_active(model: ModelConfig) -> int:
    """`active_parameters` of a configuration."""
    return active_parameters(model.model_dump())
