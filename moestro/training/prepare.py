"""From a configuration to everything a training loop needs: tokenizer, shards, model, optimizers, position.

A run directory is self-contained: `settings.json` (fully resolved), `data/` (tokenizer and token shards), checkpoints
and logs. Resuming reads all of it back and refuses a configuration that would train something else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moestro import machine
from moestro.checkpoints.files import ModelFiles, fill_model, read_json
from moestro.checks import refuse_futile
from moestro.config import SETTINGS, Config, DataConfig, build_config
from moestro.data.batches import Batch, Packer, PackState, evaluation_batches
from moestro.data.corpus import fingerprint_files, iterate_documents
from moestro.data.documents import Document
from moestro.data.shards import ShardSet, open_shards, prepare
from moestro.data.tokenizer import Tokenizer
from moestro.data.tokenizer_files import find_file
from moestro.engine.language_model import find_model_directory
from moestro.errors import ConfigError, DataError
from moestro.model.transformer import Transformer, init_weights
from moestro.ops import library
from moestro.parallel.world import ONE, World
from moestro.sizes import format_bytes
from moestro.training.checkpoint import TrainState, latest_checkpoint, load_checkpoint
from moestro.training.memory import training_memory
from moestro.training.metrics import write_atomic
from moestro.training.optim import Optimizers, lr_factor
from moestro.training.ownership import LOCK
from moestro.training.precision import precision_from, resolve_precision
from moestro.training.run_info import read_run_info

LARGE = 10**9  # bytes: beyond them, memory is told of
TOKENIZER_SAMPLE = 20_000  # documents per domain to train a tokenizer on
# a resumed run must not change these
FIXED_TRAIN_KEYS = (
    "start_from", "seed", "seq_len", "batch_size", "accumulate", "optimizer", "moments", "precision", "mask_documents",
)  # fmt: skip
MOST_NAMED = 5  # settings that an error lists
Log = Callable[[str], None]


@dataclass
class Session:
    """A run in progress: what the loop reads and moves forward."""

    config: Config
    run: Path
    tokenizer: Tokenizer
    shards: ShardSet
    packer: Packer
    model: Transformer
    optimizers: Optimizers
    state: TrainState
    world: World = ONE
    resumed: bool = False

    def validation(self, max_tokens: int | None) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Per domain with held-out documents: a function that starts its evaluation batches."""
        train = self.config.train
        return {
            domain: lambda domain=domain: evaluation_batches(  # type: ignore[misc]
                self.shards,
                domain,
                split="valid",
                batch_size=train.batch_size,
                seq_len=train.seq_len,
                max_tokens=max_tokens,
            )
            for domain in self.shards.domains
            if self.shards.num_tokens(domain, "valid") > 1
        }


def open_session(config: Config, run: Path, *, resume: bool, log: Log, world: World = ONE) -> Session:
    """Start a run in an empty directory, or continue the one that is there."""
    saved = run / SETTINGS
    then: Config | None = None
    if saved.exists():
        if not resume:
            raise ConfigError(f"{run} holds a run", hint="continue it with --resume or choose another --out")
        then = build_config(read_json(saved))
        config = check_same_run(config, then, run)
    else:
        refuse_futile(config)
        _refuse_foreign_directory(run)
        length, longest = config.train.seq_len, config.model.max_seq_len
        if length > longest:
            raise ConfigError(f"train.seq_len={length} exceeds model.max_seq_len={longest}")
        if world.size == 1:
            check_memory(config, log)
        if not library.is_available():
            log("The native kernels cannot run here, so that plain torch computes, slower (moestro doctor).")
        precision = resolve_precision(config)
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    if config.train.batch_size % world.size:
        raise ConfigError(f"train.batch_size={config.train.batch_size} cannot be dealt out to {world.size} processes")
    if world.is_main:
        open_data(config, run, log, fresh=then is None)
    world.wait()
    tokenizer, shards = open_data(config, run, log, fresh=False)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids; set model.vocab_size={tokenizer.vocab_size} or more"
        )
    model, optimizers = build_model(config)
    packer = Packer(
        shards,
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        weights=config.data.weights or None,
        seed=config.train.seed,
    )
    state = TrainState(0, config.train.steps, 0, 0.0, 0, packer.start().to_json())
    if world.is_main:
        save_config(config, run)  # only now, so a configuration that cannot be trained leaves no run behind
    world.wait()
    checkpoint = latest_checkpoint(run, log)
    if checkpoint is not None:
        state = replan(load_checkpoint(checkpoint, model, optimizers), config, then)
        if PackState.from_json(state.pack).key != packer.key:
            raise DataError(f"the text or tokenizer in {run}/data is not what the run was trained on: put it back")
        log(f"Resuming after step {state.step} from {checkpoint}")
    elif config.train.start_from:
        start = find_model_directory(Path(config.train.start_from))
        files = ModelFiles(start, ignored_keys=config.train.ignore_config_keys)
        fill_model(model, files)
        log(f"Starting from the weights of {files.directory}")
    elif then is not None:
        log(f"{run} has no checkpoint yet: starting from step 0")
    if then is not None:
        announce_changed_files(config.data.source, run, log)
    return Session(config, run, tokenizer, shards, packer, model, optimizers, state, world, resumed=then is not None)


def announce_changed_files(source: str, run: Path, log: Log) -> None:
    """Say so if the files behind the run's text are no longer those that it read."""
    then = (read_run_info(run).get("data") or {}).get("files")
    if then is not None and fingerprint_files(source) != then:
        log(
            f"The files of {source} have changed since the run began. It goes on with the text that it read then; "
            "a new run reads the new text."
        )


def check_memory(config: Config, log: Log) -> None:
    """Say what training takes if it is much. MemoryShortageError if it cannot fit, before anything is computed."""
    memory, usable = training_memory(config), machine.usable_bytes()
    if memory.total > usable:
        kept, activations = format_bytes(memory.total - memory.activations), format_bytes(memory.activations)
        raise machine.MemoryShortageError(
            f"training takes at least {format_bytes(memory.total)} of memory ({kept} for weights and the "
            f"optimizer, {activations} for activations), and {format_bytes(usable)} are free",
            hint="choose a smaller model, or lower train.batch_size and train.seq_len or set train.recompute=true",
        )
    if memory.total >= LARGE:
        log(f"Training takes {format_bytes(memory.total)} of memory and more; {format_bytes(usable)} are free.")


def build_model(config: Config) -> tuple[Transformer, Optimizers]:
    """A freshly initialised model with fp32 master weights, computing in `train.precision`, and its optimizers.

    In stages: shapes only; memory in its final place and form; values, by name; optimizers.
    """
    with torch.device("meta"):
        model = Transformer(config.model, precision_from(config))
    model.to_empty(device="cpu")
    init_weights(model, config.train.seed)
    return model, Optimizers(model, config.train)


def replan(state: TrainState, config: Config, then: Config | None) -> TrainState:
    """The state with the steps that `config` asks for; steps planned from `train.minutes` stay.

    If the learning rate had begun to decay towards an earlier end, it warms up anew.
    """
    if then is not None and config.train.minutes == then.train.minutes > 0 and config.train.steps == then.train.steps:
        return state
    total = max(config.train.steps, state.step)
    before = lr_factor(max(state.step - 1, state.warm_from), state.total_steps, config.train, state.warm_from)
    warmed_up = state.step - state.warm_from > config.train.warmup_steps
    if total > state.total_steps and warmed_up and before < 1:
        return replace(state, total_steps=total, warm_from=state.step)
    return replace(state, total_steps=total)


def check_same_run(config: Config, saved: Config, run: Path) -> Config:
    """The configuration to resume with; ConfigError naming what differs from the saved run."""
    if config.train.precision == "auto":
        train = config.train.model_copy(update={"precision": saved.train.precision})
        config = config.model_copy(update={"train": train})
    now, then = (fixed_settings(either) for either in (config, saved))
    different = [name for name in dict.fromkeys((*then, *now)) if now.get(name) != then.get(name)]
    if different:
        names = ", ".join(different[:MOST_NAMED]) + (", …" if len(different) > MOST_NAMED else "")
        values = f" ({then.get(different[0])!r}, not {now.get(different[0])!r})" if len(different) == 1 else ""
        raise ConfigError(
            f"{run} was started with another {names}{values}",
            hint="resume with the same, or choose another --out",
        )
    return config


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that a resumed run must not change, by their full names."""
    tree = config.model_dump(mode="json")
    fixed = {key: tree["train"][key] for key in FIXED_TRAIN_KEYS}
    return dict(_flatten({name: tree[name] for name in ("model", "data", "fp8")} | {"train": fixed}))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def save_config(config: Config, run: Path) -> None:
    """Write RUN/settings.json; `moestro train --config RUN/settings.json` repeats the run."""
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / SETTINGS, (json.dumps(config.model_dump(mode="json"), indent=2) + "\n").encode())


def _refuse_foreign_directory(run: Path) -> None:
    if run.is_dir() and any(entry.name not in ("data", LOCK) for entry in run.iterdir()):
        raise ConfigError(f"{run} exists and is not a run", hint="choose another --out")


def open_data(config: Config, run: Path, log: Log, *, fresh: bool) -> tuple[Tokenizer, ShardSet]:
    """The run's tokenizer and shards, made for a `fresh` run and opened on later calls.

    What a failed attempt left is made again, because its text and settings may have differed. A linked folder belongs
    to a comparison.
    """
    folder = run / "data"
    if (folder / "shards" / "index.json").exists() and (folder.is_symlink() or not fresh):
        return Tokenizer.from_file(folder / "tokenizer.json"), open_shards(folder / "shards")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = choose_tokenizer(config, log)
    tokenizer.save(folder)
    log(f"Reading text from {config.data.source}")
    documents = open_documents(config.data)
    shards = prepare(documents, tokenizer, folder / "shards", config.data.valid_fraction)
    for domain in shards.domains:
        train, valid = (shards.num_tokens(domain, split) for split in ("train", "valid"))
        log(f"  {domain:<12} {train:>11,} tokens to train on, {valid:>9,} held out")
    return tokenizer, shards


def open_documents(data: DataConfig) -> Iterator[Document]:
    """The documents of a run's source, read as its settings say."""
    return iterate_documents(data.source, encoding=data.encoding, text_field=data.text_field)


def sample_texts(documents: Iterable[Document], most: int) -> Iterator[str]:
    """The first `most` texts of every domain: domains come one after another, and each needs its own words."""
    seen: Counter[str] = Counter()
    for document in documents:
        seen[document.domain] += 1
        if seen[document.domain] <= most:
            yield document.text


def choose_tokenizer(config: Config, log: Log) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; `auto`: shipped for the built-in corpus, else trained on the text."""
    choice = config.data.tokenizer
    if choice == "auto":
        choice = "builtin" if config.data.source == "builtin" else "train"
    if choice == "builtin":
        return Tokenizer.builtin()
    if choice == "train":
        log(f"Training a tokenizer of up to {config.model.vocab_size} ids")
        texts = sample_texts(open_documents(config.data), TOKENIZER_SAMPLE)
        return Tokenizer.train(texts, config.model.vocab_size)
    path = find_file(Path(choice))
    if not path.exists():
        raise ConfigError(f"data.tokenizer is '{choice}', which is neither auto, builtin, train nor a file")
    return Tokenizer.from_file(path).beginning_with_bos()
