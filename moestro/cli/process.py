"""What a command sets for its own process. The library leaves such settings to the calling program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

from moestro.cli.output import print_note
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.engine.language_model import LanguageModel

MAX_THREADS = 1024
Threads = Annotated[int, Parameter(help="Threads to compute with; every core this process may use without it.")]
Dtype = Annotated[str, Parameter(help="auto (as stored), fp32 or bf16.")]
Weights = Annotated[
    str | None,
    Parameter(
        help="How matrices are kept: fp8, int8 or int4 quantise them, bf16 or fp32 convert them. As stored without it."
    ),
]
Activations = Annotated[
    str, Parameter(help="What meets fp8 weights: auto (activations as they are) or fp8 (rounded in tiles of 128).")
]
Cache = Annotated[str, Parameter(help="How latents are cached: auto (in the type of activations) or fp8.")]
MaxTokens = Annotated[int, Parameter(help="Most tokens to write.")]
Temperature = Annotated[
    float | None, Parameter(help="0 takes the likeliest token; 1 samples the model's own distribution.")
]
TopP = Annotated[float | None, Parameter(help="Sample from the smallest set of tokens with this much probability.")]
TopK = Annotated[int | None, Parameter(help="Sample from this many of the likeliest tokens; 0 for all.")]
Penalty = Annotated[float | None, Parameter(help="Above 1, tokens that have occurred become less likely.")]
Seed = Annotated[int, Parameter(help="The same seed and text give the same continuation.")]


MaxContext = Annotated[
    int | None,
    Parameter(
        help="Most tokens of a prompt and its continuation together; as many as the model takes and memory holds "
        "without it."
    ),
]


def split_names(_type: Any, tokens: Sequence[Token]) -> frozenset[str]:
    """`a,b` as a set of names."""
    return frozenset(name.strip() for token in tokens for name in token.value.split(",") if name.strip())


IgnoredKeys = Annotated[
    frozenset[str],
    Parameter(
        name="--ignore-config-keys",
        negative="",
        converter=split_names,
        consume_multiple=False,
        show_default=False,
        help="Keys of the model's config.json to take as absent, a comma between them.",
    ),
]


@Parameter(name="*")
@dataclass(frozen=True)
class Loading:
    """How a model is loaded: each field is a flag of every command that loads one to write or to evaluate."""

    dtype: Dtype = "auto"
    weights: Weights = None
    cache: Cache = "auto"
    activations: Activations = "auto"
    max_context: MaxContext = None
    ignore_config_keys: IgnoredKeys = frozenset()

    def load(self, directory: Path) -> LanguageModel:
        """The model of a directory; remarks go to standard error."""
        from moestro.engine.language_model import load

        return load(directory, log=print_note, **vars(self))


AS_STORED = Loading()


@Parameter(name="*")
@dataclass(frozen=True)
class SamplingFlags:
    """How a text is sampled; what is None is as the model's directory recommends."""

    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    repetition_penalty: Penalty = None
    seed: Seed = 0


AS_RECOMMENDED = SamplingFlags()


def use_threads(threads: int) -> None:
    """Compute with this many threads, 0 for every core this process may use. ConfigError outside 0…1024."""
    if not 0 <= threads <= MAX_THREADS:
        raise ConfigError(f"--threads must lie between 0 and {MAX_THREADS}, not {threads}")
    from moestro import machine

    machine.use_threads(threads)
