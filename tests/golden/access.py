"""What the golden losses use of Moestro, in one place: whatever is renamed there is followed here and nowhere else.

Trees of settings, tensors and plain numbers go in and out. Parameters are set by whoever calls `start`, so that a new
way to initialise them changes no golden number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moestro
from moestro.config import build_config, load_preset, preset_names
from moestro.data.batches import Batch
from moestro.model.transformer import Transformer
from moestro.ops import library
from moestro.training.optim import Optimizers
from moestro.training.step import train_step

Rows = tuple[Tensor, Tensor]  # tokens and segments of a micro-batch, both [rows, seq_len + 1]
Fill = Callable[[str, Tensor], None]  # sets a parameter, or the bias of a router, in place by its name


@dataclass(frozen=True)
class Report:
    """What one step told: the total loss, the norm of the gradient, choices per router and expert."""

    loss: float
    grad_norm: float
    loads: Tensor


def package_folder() -> Path:
    """Where a child process finds the same package."""
    return Path(moestro.__file__).parent.parent


def router_presets() -> dict[str, dict[str, Any]]:
    """Every shipped routing scheme: its name and the `model` section it sets."""
    return {name: load_preset(name, "presets/routers")["model"] for name in preset_names("presets/routers")}


def kernels_run() -> bool:
    """Whether the compiled kernels are built and this CPU can run them."""
    return library.load_library() is not None


def kernels_compiler() -> str:
    """What compiled the kernels, as the library itself says; empty where it does not."""
    built = library.LIBRARY.read_bytes() if library.LIBRARY.exists() else b""
    found = re.search(rb"clang version [\d.]+|GCC: \([^)]*\) [\d.]+", built)
    return found.group().decode() if found else ""


def force_kernels() -> None:
    """Leave every product to the kernels, also where torch's BLAS is thought to be as fast."""
    library.multiplies_faster = lambda dtype: True  # type: ignore[assignment]


def start(tree: dict[str, Any], precision: str, fill: Fill) -> Callable[[Sequence[Rows], int], Report]:
    """A model of the settings in `tree` with parameters from `fill` -> its training step, of micro-batches and a seed.

    `precision` is `fp32` or `bf16`.
    """
    config = build_config(tree)
    model = Transformer(config.model, "bf16" if precision == "bf16" else "fp32")
    fill_model(model, fill, with_biases=config.model.router.bias != "none")
    optimizers = Optimizers(model, config.train)
    token_bytes = torch.ones(config.model.vocab_size, dtype=torch.int64)
    numbers = {"lr": 3e-3, "mtp_weight": 0.3, "bias_speed": 0.02}

    def step(rows: Sequence[Rows], seed: int) -> Report:
        batches = [Batch(tokens, segments) for tokens, segments in rows]
        result = train_step(
            model, optimizers, batches, config.train, token_bytes=token_bytes, noise_seed=seed, **numbers
        )
        return Report(result.loss, result.grad_norm, result.loads)

    return step


@torch.no_grad()
def fill_model(model: nn.Module, fill: Fill, *, with_biases: bool) -> None:
    """Set every parameter and, where a rule moves them, the biases of the routers."""
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    for name, buffer in model.named_buffers():
        if with_biases and name.endswith("router.bias"):
            fill(name, buffer)
