"""The precisions of products, by the names that configurations use, and the settings of FP8."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Literal

import torch

from moestro.ops.fp8 import Scale

PlainPrecision = Literal["fp32", "bf16"]
Format = Literal["e4m3", "e5m6"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Fp8Recipe:
    """Products in FP8, forward and backward, of bf16 activations (docs/fp8-training.md; fields: `config.Fp8Config`).

    `inputs` is the format of a layer's inputs: E4M3, or E5M6 for the projection after attention.
    """

    scale: Scale = "fp32"
    transpose: Literal["requantize", "both"] = "requantize"
    accumulate: Literal["fp32", "hopper"] = "fp32"
    promote: int = 128
    tile: Literal["block", "tensor"] = "block"
    dgrad_tile: Literal["row", "square"] = "row"
    inputs: Format = "e4m3"

    @property
    def key(self) -> str:
        """The recipe as text, which operators take; `read_recipe` is its inverse."""
        return ",".join(map(str, astuple(self)))


Precision = PlainPrecision | Fp8Recipe


@cache
def read_recipe(key: str) -> Fp8Recipe:
    """The recipe that a key names."""
    scale, transpose, accumulate, promote, *rest = key.split(",")
    return Fp8Recipe(scale, transpose, accumulate, int(promote), *rest)  # type: ignore[arg-type]


def compute_dtype(precision: Precision | str) -> torch.dtype:
    """The type of activations under a precision; ValueError for an unknown one."""
    if isinstance(precision, Fp8Recipe):
        return torch.bfloat16
    if precision not in DTYPES:
        raise ValueError(f"unknown precision '{precision}': it is one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def precision_of(dtype: torch.dtype) -> PlainPrecision:
    """The precision whose activations have this type; ValueError if there is none."""
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype == torch.float32:
        return "fp32"
    raise ValueError(f"no precision computes in {dtype}")


def without_fp8(precision: Precision) -> PlainPrecision:
    """For parts that FP8 leaves alone: bf16 instead of FP8."""
    return "bf16" if isinstance(precision, Fp8Recipe) else precision


def after_attention(precision: Precision) -> Precision:
    """For the projection after attention, whose inputs are E5M6: its backward pass and attention's both read them."""
    return replace(precision, inputs="e5m6") if isinstance(precision, Fp8Recipe) else precision
