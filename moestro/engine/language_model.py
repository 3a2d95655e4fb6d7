"""A model with its tokenizer, loaded from a directory and ready to write text.

`load` takes a run, its checkpoint, any Hugging Face `deepseek_v3` or `deepseek_v2` directory, or packed weights.
The same engine that serves many requests writes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Unpack

from torch import Tensor

from moestro import machine
from moestro.checkpoints.files import DTYPES, ModelFiles, read_model
from moestro.checkpoints.hub import find_cached, is_hub_name
from moestro.checkpoints.packed import SHARD_BYTES, PackedFiles, dtype_name, is_packed, write_packed
from moestro.checkpoints.packing import Source, choose_format, pack_model, packed_bytes, write_parts
from moestro.data.tokenizer import Tokenizer
from moestro.engine.defaults import NO_DEFAULTS, GenerationDefaults, Settings, read_defaults, read_stop_ids
from moestro.engine.engine import Engine
from moestro.engine.events import Completion, Event, TokenLogprob
from moestro.engine.paged_cache import check_context
from moestro.engine.runtime import Runtime
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import CheckpointError, ConfigError, MoestroError
from moestro.model.attention import check_cache
from moestro.model.transformer import Transformer
from moestro.sizes import format_bytes

LARGE = 10**9  # bytes: beyond them, memory is told of
WITHOUT_KERNELS = (
    "The native kernels cannot run here, so that products are those of torch's library: a text may differ in rare "
    "tokens with what is computed beside it (moestro doctor)."
)
MAX_STREAMS = 8  # sequences that are computed at once; a stream beyond them waits until one ends


@dataclass(frozen=True)
class Generation:
    """The continuation of a prompt: `text` and `ids` without the prompt; `finish_reason` is "stop" or "length".

    Only where they were asked for: `logprobs`, one for each of `ids`; `routes` [tokens, MoE layers, top_k] int16, the
    experts of every token of `prompt_ids` and `ids` but the last, which the model never read. Layer i of them is block
    `config.moe_layers[i]`.
    """

    text: str
    ids: list[int]
    finish_reason: str
    prompt_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    routes: Tensor | None = None


class LanguageModel:
    """Model, tokenizer, the ids that end a text, and how the model's authors recommend to sample it (`defaults`).

    `source` is a model or a directory's files; `runtime` and `model` each read what they need from them when first
    used. `weights` is how matrices are packed for serving (None: as they are stored as codes, else as they are computed
    with), `cache` how latents are cached (auto: in the type of activations; fp8), `activations` what meets fp8 weights
    (auto: rows as they are; fp8: see `Runtime`), `max_context` how many tokens a prompt and its continuation may have
    (None: as many as the model takes and memory holds). Memory is taken for what is asked, not for all of them.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        *,
        defaults: GenerationDefaults = NO_DEFAULTS,
        weights: str | None = None,
        cache: str = "auto",
        activations: str = "auto",
        max_context: int | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        check_cache(source.config, cache)
        check_context(source.config, max_context)
        self.max_context, self._log = max_context, log or (lambda text: None)
        self.source, self.config = source, source.config
        self.tokenizer, self.defaults = tokenizer, defaults
        self.stop_ids, self.cache, self.activations = stop_ids, cache, activations
        has_format = isinstance(source, PackedFiles) or (isinstance(source, ModelFiles) and source.scheme is not None)
        self.weights = choose_format(source, weights) if weights or has_format else None

    @cached_property
    def model(self) -> Transformer:
        """The whole model, to train, take apart or evaluate; CheckpointError if there are only packed weights."""
        if isinstance(self.source, PackedFiles):
            raise CheckpointError(f"{self.source.directory} holds weights packed for serving: this needs the original")
        if isinstance(self.source, ModelFiles):
            with machine.explain_memory_errors("to load this model"):
                return read_model(self.source)
        return self.source.eval()

    @cached_property
    def runtime(self) -> Runtime:
        """The model packed for serving. MemoryShortageError if its weights do not fit into memory."""
        needed, is_mapped = self.weights_bytes, isinstance(self.source, PackedFiles)
        usable = machine.usable_bytes()
        if needed >= LARGE:
            where = "mapped from their files" if is_mapped else f"{format_bytes(usable)} of memory are free"
            self._log(f"Weights take {format_bytes(needed)}; {where}.")
        if not is_mapped:
            machine.require_memory(needed, "this model's weights take")
        with machine.explain_memory_errors("to load this model"):
            runtime = Runtime(pack_model(self.source, self.weights), self.cache, self.activations)
        if runtime.is_plain:
            self._log(WITHOUT_KERNELS)
        return runtime

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all weights as they are served."""
        return sum(packed_bytes(self.source, self.weights).values())

    @cached_property
    def engine(self) -> Engine:
        """An engine for a few sequences; what a prompt shares with previous ones is not computed again."""
        limits = {"max_context": self.max_context, "max_running": MAX_STREAMS}
        engine = Engine(self.runtime, self.tokenizer, self.stop_ids, grows=True, **limits)  # type: ignore[arg-type]
        if self.max_context is None and engine.room.context < self.config.max_seq_len:
            self._log(f"The context is {engine.describe_context()}: no more fits into memory.")
        return engine

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its continuation may have: what was asked for, or what fits into memory."""
        return self.engine.room.context

    def encode(self, prompt: str | Sequence[int], *, parse_special: bool = False) -> list[int]:
        """The ids of a text as a prompt, see `Tokenizer.encode_prompt`; ids stay as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt, parse_special=parse_special)
        return list(prompt)

    def stream_ids(self, prompt: Sequence[int], **settings: Unpack[Settings]) -> Iterator[int]:
        """Yield token ids after `prompt` until a stop id (yielded last) or `max_tokens`.

        `settings`: see `SamplingParams`. Several streams may be read in turn, by one thread; each gets the tokens that
        it would get alone. MoestroError if the model fails.
        """
        for event in self._stream(prompt, SamplingParams(**settings)):
            if event.token is not None:
                yield event.token

    def _stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        """The events of one request; MoestroError if it fails."""
        if params.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {params.max_tokens}")
        with closing(self.engine.stream(Request(prompt, params))) as events:
            for event in events:
                if event.error is not None:
                    raise MoestroError(event.error.message)
                yield event

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        logprobs: int | None = None,
        routes: bool = False,
        **settings: Unpack[Settings],
    ) -> Generation:
        """Continue a text (as the beginning of a document) or token ids.

        Greedy by default; `**model.defaults.choose()` samples as the model's authors recommend. `logprobs`: how many of
        the likeliest tokens to report in each place, beside the log-probability of the one written; `routes`: whether
        to report experts.
        """
        ids = self.encode(prompt)
        params = SamplingParams(**settings, logprobs=logprobs, return_routes=routes)
        done = Completion()
        for event in self._stream(ids, params):
            done.add(event)
        stopped = bool(done.ids) and done.ids[-1] in self.stop_ids
        text = self.tokenizer.decode(done.ids[:-1] if stopped else done.ids)
        scores = None if logprobs is None else done.logprobs
        return Generation(text, done.ids, "stop" if stopped else "length", ids, scores, done.routes)


def find_model_directory(path: Path) -> Path:
    """The model directory that `path` means: the newest checkpoint of a run, or itself."""
    checkpoints = sorted(d for d in (path / "checkpoints").glob("step-*") if d.suffix != ".tmp")
    if checkpoints:
        return checkpoints[-1]
    if (path / "config.json").is_file():
        return path
    if (path / "run.json").is_file():
        raise CheckpointError(f"{path} is a run without a checkpoint yet")
    if not path.exists():
        return find_on_hub(path)
    raise CheckpointError(f"{path} is neither a run with a checkpoint nor a model directory (no config.json)")


def find_on_hub(path: Path) -> Path:
    """The cached directory of a name of the Hugging Face Hub; CheckpointError if it is no name, or not cached."""
    if not is_hub_name(path):
        raise CheckpointError(f"{path} does not exist; give a run, a checkpoint or a Hugging Face model directory")
    directory = find_cached(path.as_posix())
    if directory is None:
        raise CheckpointError(f"{path} is no directory; if it is a model of the Hub: hf download {path}")
    return directory


def load(
    path: str | Path,
    dtype: str = "auto",
    *,
    weights: str | None = None,
    cache: str = "auto",
    activations: str = "auto",
    max_context: int | None = None,
    log: Callable[[str], None] | None = None,
    ignore_config_keys: Collection[str] = (),
) -> LanguageModel:
    """Open a run, a checkpoint, a Hugging Face directory or one of packed weights, and check that it is complete.

    A name of the Hugging Face Hub, such as deepseek-ai/DeepSeek-V2-Lite, means its directory in the Hub's cache.
    `dtype` is auto (as stored), fp32 or bf16; `weights`, `cache`, `activations`, `max_context`: see `LanguageModel`.
    `log` is told of what is not as one expects, and what a large model takes. Keys of config.json that are in
    `ignore_config_keys` are treated as absent.
    """
    source = open_source(Path(path), dtype, ignore_config_keys)
    tokenizer = Tokenizer.from_file(source.directory)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise CheckpointError(
            f"{source.directory}: the tokenizer has {tokenizer.vocab_size} ids and the model embeds only "
            f"{source.config.vocab_size}: they do not belong together"
        )
    if log is not None:
        for notice in tokenizer.notices:
            log(f"{source.directory}: {notice}")
    stop_ids, defaults = read_stop_ids(source.directory, tokenizer.eos_id), read_defaults(source.directory)
    return LanguageModel(
        source,
        tokenizer,
        stop_ids,
        defaults=defaults,
        weights=weights,
        cache=cache,
        activations=activations,
        max_context=max_context,
        log=log,
    )


def open_source(path: Path, dtype: str, ignore_config_keys: Collection[str] = ()) -> ModelFiles | PackedFiles:
    """The files that a path means; ConfigError if packed weights are for other activations than `dtype`."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be auto, fp32 or bf16, not '{dtype}'")
    directory = find_model_directory(path)
    if not is_packed(directory):
        return ModelFiles(directory, DTYPES.get(dtype), ignore_config_keys)
    files = PackedFiles(directory, ignore_config_keys)
    if dtype not in ("auto", dtype_name(files.dtype)):
        raise ConfigError(f"{directory} is packed for {dtype_name(files.dtype)}, not {dtype}: pack the original again")
    return files


@dataclass(frozen=True)
class PackedSize:
    """What `pack` wrote: the format of the weights, the dtype of activations, and the bytes of all tensors."""

    format: str
    dtype: str
    nbytes: int


def pack(
    path: Path,
    out: Path,
    dtype: str = "auto",
    *,
    weights: str | None = None,
    log: Callable[[str], None] = lambda text: None,
    ignore_config_keys: Collection[str] = (),
) -> PackedSize:
    """Pack a run, a checkpoint or a Hugging Face directory into `out`, one part at a time; see `write_packed`."""
    source = open_source(path, dtype, ignore_config_keys)
    if isinstance(source, PackedFiles):
        raise ConfigError(f"{source.directory} is packed already: pack the original")
    format = choose_format(source, weights)
    sizes = packed_bytes(source, format).values()
    if sum(sizes) >= LARGE:
        log(f"Writing {format_bytes(sum(sizes))} of {format} weights; memory holds one part and one file of them.")
    machine.require_memory(max(sizes) + min(sum(sizes), SHARD_BYTES), "packing this model takes")
    with write_packed(out, source, format) as save:
        nbytes = write_parts(source, format, save)
    return PackedSize(format, dtype_name(source.dtype), nbytes)
