"""Moestro: the MoE you can see, and the same MoE everywhere.

    import moestro
    outcome = moestro.train(moestro.Config(), "runs/mine")     # train a model
    model = moestro.load("runs/mine")                          # a run, a checkpoint, a Hugging Face directory
    print(model.generate("Once upon a time").text)

Names are imported when they are first used, so that `moestro --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moestro.version import __version__ as __version__

if TYPE_CHECKING:
    from moestro.compare.comparison import Comparison as Comparison
    from moestro.compare.comparison import compare as compare
    from moestro.config import Config as Config
    from moestro.engine.language_model import Generation as Generation
    from moestro.engine.language_model import LanguageModel as LanguageModel
    from moestro.engine.language_model import load as load
    from moestro.errors import MoestroError as MoestroError
    from moestro.report.writing import report as report
    from moestro.training.evaluate import evaluate as evaluate
    from moestro.training.loop import Outcome as Outcome
    from moestro.training.loop import train as train

_HOMES = {
    "Comparison": "moestro.compare.comparison",
    "Config": "moestro.config",
    "Generation": "moestro.engine.language_model",
    "LanguageModel": "moestro.engine.language_model",
    "MoestroError": "moestro.errors",
    "Outcome": "moestro.training.loop",
    "compare": "moestro",
    "evaluate": "moestro.training.evaluate",
    "load": "moestro.engine.language_model",
    "report": "moestro",
    "train": "moestro.training.loop",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro' has no attribute '{name}'")
    if _HOMES[name] == "moestro":  # a package that can be called
        return import_module(f"moestro.{name}")
    return getattr(import_module(_HOMES[name]), name)
