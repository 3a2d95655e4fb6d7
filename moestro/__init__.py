"""Moestro: the MoE you can see, and the same MoE everywhere.

    import moestro
    outcome = moestro.train(moestro.Config(), "runs/mine")     # train a model
    model = moestro.load("runs/mine")                          # a run, a checkpoint, a Hugging Face directory
    print(model.generate("Once upon a time").text)

Names are imported when they are first used, so that `moestro --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moestro.version import __version__ as __version__

if TYPE_CHECKING:
    from moestro.config import Config as Config
    from moestro.engine.language_model import LanguageModel as LanguageModel
    from moestro.engine.language_model import load as load
    from moestro.errors import MoestroError as MoestroError
    from moestro.training.loop import train as train

_HOMES = {
    "Config": "moestro.config",
    "LanguageModel": "moestro.engine.language_model",
    "MoestroError": "moestro.errors",
    "load": "moestro.engine.language_model",
    "train": "moestro.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
