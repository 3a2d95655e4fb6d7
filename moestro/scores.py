"""The score functions of routers: one entry each, which every other place asks.

An entry says how logits become scores; training and serving need nothing more. The kernels have numbers of their own
for those they know (`ops/abi.py`); any other is computed in plain torch, and a served step takes several calls instead
of one. `config.py` refuses names that are not here. Torch is not imported before a function is called, so that
configurations stay cheap to read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Arithmetic(Protocol):
    """How numbers are computed: as torch does it best, or so that each row depends on itself alone."""

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """An elementwise function."""

    def softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""

    def sum(self, x: Tensor) -> Tensor:
        """Over the last axis, kept with length 1."""


@dataclass(frozen=True)
class ScoreFunction:
    """Logits [N, E] -> scores [N, E] of the same type; with `is_learned`, a gate gives logits, and has a gradient."""

    apply: Callable[[Tensor, Arithmetic], Tensor]
    is_learned: bool = True


def _sigmoid(logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    import torch

    return arithmetic.apply(torch.sigmoid, logits)


def _softmax(logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    return arithmetic.softmax(logits)


def _sqrt_softplus(logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    import torch
    import torch.nn.functional as F

    return arithmetic.apply(F.softplus, logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()  # √ has no slope at 0


def _ones(logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    return logits.new_ones(logits.shape)


SCORES = {
    "sigmoid": ScoreFunction(_sigmoid),
    "softmax": ScoreFunction(_softmax),
    "sqrt_softplus": ScoreFunction(_sqrt_softplus),
    "constant": ScoreFunction(_ones, is_learned=False),
}
