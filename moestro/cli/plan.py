"""What `moestro train` says before it trains: text, model, length, time and memory, and what will disappoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.checks import idle_settings, refuse_futile
from moestro.cli.inspect import format_count
from moestro.cli.output import print_json, print_note
from moestro.config import Config, build_config
from moestro.data.files import ARCHIVES, DOCUMENTS, advise
from moestro.errors import ConfigError
from moestro.machine import GIB
from moestro.machine.memory import memory_bytes
from moestro.sizes import format_bytes
from moestro.terminal import printable

if TYPE_CHECKING:
    from moestro.data.survey import Survey
    from moestro.data.tokenizer import Tokenizer
    from moestro.training.plan import TextSize, TrainingPlan

MOST_STEPS = 10**7  # where minutes alone limit a run
CALIBRATION_DEPTH = 3  # a model that takes a second or two to time, and is not so small that calls cost more than work
MOST_REASONS = 8
PROGRAM_BYTES = 600 * 2**20  # Python, torch and a tokenizer at work, beside the model
MEASURED_PARAMETERS = 40e6  # larger models are not built to be timed: their time follows from their arithmetic


@dataclass(frozen=True)
class Planned:
    """A configuration that is settled, and its plan."""

    settings: Config
    survey: Survey
    plan: TrainingPlan
    memory_bytes: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What a dry run prints with --json."""
        from moestro.model.size import describe_size

        config = self.settings.model_dump(mode="json")
        plan = {**self.plan.to_json(), "memory_bytes": self.memory_bytes, "warnings": list(self.warnings)}
        return {"config": config, **describe_size(self.settings.model), "plan": plan}


@dataclass(frozen=True)
class Open:
    """What the user leaves to the text and the time: the size of the model, the length of training."""

    size: bool
    length: bool


@dataclass(frozen=True)
class Printed:
    """What the user asked to see."""

    quiet: bool
    dry_run: bool
    json: bool


def settle_length(overrides: tuple[str, ...], *, from_text: bool) -> tuple[str, ...]:
    """Overrides under which the one of steps and minutes that is given beats the other one of a preset.

    With both, whichever is reached first ends the run. `from_text`: the most steps follow from the text.
    """
    keys = given_keys(overrides)
    if "train.steps" in keys and "train.minutes" not in keys:
        return (*overrides, "train.minutes=0")
    if "train.minutes" in keys and "train.steps" not in keys and not from_text:
        return (*overrides, f"train.steps={MOST_STEPS}")
    return overrides


def given_keys(overrides: tuple[str, ...]) -> set[str]:
    """The settings that overrides name."""
    return {pair.partition("=")[0].strip() for pair in overrides}


def plan_run(tree: dict[str, Any], overrides: tuple[str, ...], left_open: Open, *, timed: bool) -> Planned:
    """Read the text, settle what follows from it, and, if `timed`, measure how long that takes on this machine."""
    from moestro.data.corpus import Corpus
    from moestro.data.survey import survey
    from moestro.model.size import measure_size
    from moestro.training import plan
    from moestro.training.memory import training_memory

    settings = build_config(tree, overrides)
    refuse_futile(settings)
    data = settings.data
    found = survey(Corpus(data.source, encoding=data.encoding, text_field=data.text_field))
    tokenizer = known_tokenizer(settings)
    if left_open.size:
        tree = fit_to_text(tree, overrides, found, tokenizer)
        settings = build_config(tree, overrides)
    text = plan.measure_text(found, settings, tokenizer)
    plan.refuse_little(text, settings)
    if left_open.length:
        settings = build_config(set_train(tree, {"steps": find_steps(settings, text)}), overrides)
    needed = training_memory(settings).total + PROGRAM_BYTES
    seconds = None
    if timed and is_alone() and needed <= memory_bytes()[0]:
        settings, seconds = time_step_of(settings)
    size = measure_size(settings.model)
    planned = plan.plan_training(settings, text, size, seconds)
    if left_open.length:
        tree = set_train(settings.model_dump(mode="json"), plan.pace(settings, planned.steps))
        settings = build_config(tree, of_pace(overrides))
        planned = plan.plan_training(settings, text, size, seconds)
    warnings = (*plan.warn(planned, settings, found), *idle_settings(settings))
    return Planned(settings, found, planned, needed, warnings)


def is_alone() -> bool:
    """Whether this process trains by itself."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def set_train(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The raw configuration with other values in [train]."""
    return {**tree, "train": {**tree.get("train", {}), **values}}


def of_pace(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Those that say how a run is paced."""
    names = ("train.eval_", "train.checkpoint_every", "train.warmup_steps")
    return tuple(pair for pair in overrides if pair.strip().startswith(names))


def known_tokenizer(settings: Config) -> Tokenizer | None:
    """The tokenizer, unless it is to be made from the text."""
    from moestro.training.plan import trains_tokenizer
    from moestro.training.prepare import choose_tokenizer

    return None if trains_tokenizer(settings) else choose_tokenizer(settings, print_note)


def fit_to_text(
    tree: dict[str, Any], overrides: tuple[str, ...], found: Survey, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The raw configuration that the rule of `training/plan.py` gives for a text, on this machine."""
    from moestro.training import plan

    if not is_alone():
        raise ConfigError("several processes cannot choose a size each", hint="give --depth or --preset")
    vocabulary = tokenizer.vocab_size if tokenizer else plan.choose_vocabulary(found)
    probe = plan.fit_tree(CALIBRATION_DEPTH, vocabulary) | {"data": tree.get("data", {})}
    settings = build_config(probe, overrides)
    keys, train = given_keys(overrides), settings.train
    text_tokens = plan.measure_text(found, settings, tokenizer).train
    tokens = plan.FEW_PASSES * text_tokens if found.complete else float("inf")
    if "train.steps" in keys:
        tokens = min(tokens, train.steps * plan.tokens_per_step(settings))
    flops = float("inf")
    if train.minutes:
        print_note("Measuring how fast this machine trains")
        flops = train.minutes * 60 * measure_flops(build_config(probe, [f"train.precision={train.precision}"]))
    return {**plan.fit_tree(plan.choose_depth(tokens, flops, vocabulary), vocabulary), "data": probe["data"]}


def find_steps(settings: Config, text: TextSize) -> int:
    """The most steps that the rule gives a model of this size."""
    from moestro.training import plan

    if not text.complete:
        return MOST_STEPS if settings.train.minutes else settings.train.steps
    fill = settings.train.minutes > 0
    return plan.most_steps(plan.count_active(settings.model), text.train, plan.tokens_per_step(settings), fill=fill)


def with_precision(settings: Config) -> Config:
    """The configuration with its precision chosen, as training would."""
    from moestro.training.precision import resolve_precision

    train = settings.train.model_copy(update={"precision": resolve_precision(settings)})
    return settings.model_copy(update={"train": train})


def measure_flops(settings: Config) -> float:
    """Floating-point operations per second of training, by the count of `flops_per_token`."""
    from moestro.training.speed import time_step

    return step_flops(settings) / time_step(with_precision(settings))


def time_step_of(settings: Config) -> tuple[Config, float]:
    """The configuration with its precision chosen and the seconds of a step.

    A large model keeps its precision open, and its time is scaled from a small one's by their arithmetic.
    """
    from moestro.model.size import measure_size
    from moestro.training import plan
    from moestro.training.speed import time_step

    size = measure_size(settings.model)
    if size.total + size.mtp <= MEASURED_PARAMETERS:
        settings = with_precision(settings)
        return settings, time_step(settings)
    small = plan.fit_tree(CALIBRATION_DEPTH, settings.model.vocab_size)
    probe = build_config(small, [f"train.precision={settings.train.precision}"])
    return settings, step_flops(settings) / measure_flops(probe)


def step_flops(settings: Config) -> float:
    """Floating-point operations of one step."""
    from moestro.model.size import training_flops
    from moestro.training.plan import tokens_per_step

    return float(training_flops(settings.model, settings.train.seq_len) * tokens_per_step(settings))


def settle(
    tree: dict[str, Any],
    overrides: tuple[str, ...],
    left_open: Open,
    run: Path,
    printed: Printed,
) -> Config:
    """The configuration to train, after its plan has been printed; the main process prints for all."""
    quiet = printed.quiet or os.environ.get("RANK", "0") != "0"
    planned = plan_run(tree, overrides, left_open, timed=not quiet)
    if not quiet:
        print_plan(planned, run, print if printed.dry_run and not printed.json else print_note)
    if printed.dry_run and printed.json:
        print_json(planned.to_json())
    return planned.settings


def print_plan(planned: Planned, run: Path, say: Callable[[str], None]) -> None:
    """The plan, and a line for each warning."""
    for name, value in plan_rows(planned, run):
        say(f"  {name:<9} {printable(value)}")
    for warning in planned.warnings:
        say(printable(f"  warning: {warning}"))


def plan_rows(planned: Planned, run: Path) -> Iterator[tuple[str, str]]:
    """What will happen, as names and values."""
    plan, settings, found = planned.plan, planned.settings, planned.survey
    yield "text", describe_text(planned)
    if found.skipped:
        yield "", "left out: " + describe_skipped(found.skipped)
    yield from (("", notice) for notice in found.notices)
    model, size = settings.model, plan.size
    shape = f"{model.num_layers} layers, {model.hidden_dim} wide"
    if model.num_moe_layers:
        shape += f", {model.top_k} of {model.num_experts} experts a token"
    yield "model", f"{shape}: {format_count(size.total)} parameters, {format_count(size.active)} active"
    per_step = plan.tokens // plan.steps
    passes = "" if plan.passes is None else f", {plan.passes:.1f} passes over the text"
    yield "training", f"{plan.steps:,} steps of {per_step:,} tokens: {format_count(plan.tokens)} tokens{passes}"
    if plan.seconds is not None and plan.tokens_per_second is not None:
        limit = f" (at most {settings.train.minutes:g} minutes: train.minutes)" if settings.train.minutes else ""
        precision = "" if settings.train.precision == "auto" else f" in {settings.train.precision}"
        speed = f"{plan.tokens_per_second:,.0f} tokens/s{precision}, measured here"
        yield "time", f"about {describe_duration(plan.seconds)}{limit}, {speed}"
    total, free = memory_bytes()
    yield "memory", f"about {planned.memory_bytes / GIB:,.1f} GiB; {free / GIB:,.1f} of {total / GIB:,.1f} GiB are free"
    yield "run", str(run)


def describe_text(planned: Planned) -> str:
    """Files, bytes, tokens, domains."""
    found, text = planned.survey, planned.plan.text
    files = f"{found.files:,} files, " if found.files else ""
    if not found.complete:
        return f"a stream of unknown size, {text.bytes_per_token:.1f} bytes a token at its beginning"
    held_out = sum(text.held_out.values())
    domains = f" in {len(found.domains)} domains" if len(found.domains) > 1 else ""
    return (
        f"{files}{format_bytes(found.bytes)}{domains}: about {format_count(text.train + held_out)} tokens, "
        f"{format_count(held_out)} of them held out; vocabulary of {planned.settings.model.vocab_size:,}"
    )


def describe_skipped(skipped: dict[str, int]) -> str:
    """Counts by reason; what to do about kinds of files that hold text all the same."""
    parts = []
    for reason, count in list(skipped.items())[:MOST_REASONS]:
        advice = f" ({advise(reason)})" if reason in (*ARCHIVES, *DOCUMENTS) else ""
        parts.append(f"{count:,} {reason}{advice}")
    rest = sum(skipped.values()) - sum(list(skipped.values())[:MOST_REASONS])
    return ", ".join([*parts, *([f"{rest:,} others"] if rest else [])])


def describe_duration(seconds: float) -> str:
    """In the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"
