"""A model with its tokenizer, loaded from a directory and ready to write text.

`load` takes a run, its checkpoint, any Hugging Face `deepseek_v3` or `deepseek_v2` directory, or packed weights.
The same engine that serves many requests writes the text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moestro.checkpoints.files import DTYPES, ModelFiles, read_json, read_model
from moestro.checkpoints.packed import PackedFiles, dtype_name, is_packed, write_packed
from moestro.checkpoints.packing import Source, choose_format, pack_model, write_parts
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.runtime import Runtime
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import CheckpointError, ConfigError, MoestroError
from moestro.model.attention import check_cache
from moestro.model.transformer import Transformer


@dataclass(frozen=True)
class Generation:
    """The continuation of a prompt: `text` and `ids` without the prompt; `finish_reason` is "stop" or "length"."""

    text: str
    ids: list[int]
    finish_reason: str


class LanguageModel:
    """Model, tokenizer, and the ids that end a text.

    `source` is a model or a directory's files; `runtime` and `model` each read what they need from them when first
    used. `weights` is how matrices are packed for serving (None: as they are stored as codes, else as they are computed
    with), `cache` how latents are cached (auto: in the type of activations; fp8), `activations` what meets fp8 weights
    (auto: rows as they are; fp8: see `Runtime`).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        *,
        weights: str | None = None,
        cache: str = "auto",
        activations: str = "auto",
    ) -> None:
        check_cache(source.config, cache)
        self.source, self.config = source, source.config
        self.tokenizer = tokenizer
        self.stop_ids, self.cache, self.activations = stop_ids, cache, activations
        has_format = isinstance(source, PackedFiles) or (isinstance(source, ModelFiles) and source.scheme is not None)
        self.weights = choose_format(source, weights) if weights or has_format else None

    @cached_property
    def model(self) -> Transformer:
        """The whole model, to train, take apart or evaluate; CheckpointError if there are only packed weights."""
        if isinstance(self.source, PackedFiles):
            raise CheckpointError(f"{self.source.directory} holds weights packed for serving: this needs the original")
        if isinstance(self.source, ModelFiles):
            return read_model(self.source)
        return self.source.eval()

    @cached_property
    def runtime(self) -> Runtime:
        """The model packed for serving."""
        return Runtime(pack_model(self.source, self.weights), self.cache, self.activations)

    @cached_property
    def engine(self) -> Engine:
        """An engine for one sequence at a time; what a prompt shares with the previous one is not computed again."""
        return Engine(self.runtime, self.tokenizer, self.stop_ids, max_running=1)

    def stream_ids(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield token ids after `prompt` until a stop id (yielded last) or `max_tokens`.

        Several streams may be read in turn, by one thread. MoestroError if the model fails.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        with closing(self.engine.stream(Request(prompt, params))) as events:
            for event in events:
                if event.error is not None:
                    raise MoestroError(event.error.message)
                if event.token is not None:
                    yield event.token

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generation:
        """Continue a text (as the beginning of a document) or token ids. Greedy by default."""
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        stream = self.stream_ids(ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        written = list(stream)
        stopped = bool(written) and written[-1] in self.stop_ids
        text = self.tokenizer.decode(written[:-1] if stopped else written)
        return Generation(text, written, "stop" if stopped else "length")


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
        raise CheckpointError(f"{path} does not exist; give a run, a checkpoint or a Hugging Face model directory")
    raise CheckpointError(f"{path} is neither a run with a checkpoint nor a model directory (no config.json)")


def load(
    path: str | Path,
    dtype: str = "auto",
    *,
    weights: str | None = None,
    cache: str = "auto",
    activations: str = "auto",
    ignore_config_keys: Collection[str] = (),
) -> LanguageModel:
    """Open a run, a checkpoint, a Hugging Face directory or one of packed weights, and check that it is complete.

    `dtype` is auto (as stored), fp32 or bf16; `weights`, `cache` and `activations`: see `LanguageModel`. Keys of
    config.json that are in `ignore_config_keys` are treated as absent.
    """
    source = open_source(Path(path), dtype, ignore_config_keys)
    tokenizer = Tokenizer.from_file(source.directory / "tokenizer.json")
    stop_ids = _stop_ids(source.directory, tokenizer)
    return LanguageModel(source, tokenizer, stop_ids, weights=weights, cache=cache, activations=activations)


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
    ignore_config_keys: Collection[str] = (),
) -> PackedSize:
    """Pack a run, a checkpoint or a Hugging Face directory into `out`, one part at a time; see `write_packed`."""
    source = open_source(path, dtype, ignore_config_keys)
    if isinstance(source, PackedFiles):
        raise ConfigError(f"{source.directory} is packed already: pack the original")
    format = choose_format(source, weights)
    with write_packed(out, source, format) as save:
        nbytes = write_parts(source, format, save)
    return PackedSize(format, dtype_name(source.dtype), nbytes)


def _stop_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """End-of-sequence ids from the generation config and the tokenizer."""
    path = directory / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.exists() else None
    ids = listed if isinstance(listed, list) else [listed]
    return frozenset([tokenizer.eos_id, *(i for i in ids if isinstance(i, int))])
