"""The precisions of products, by the names that configurations use."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(precision: str) -> torch.dtype:
    """The type of activations under a precision; ValueError for an unknown one."""
    if precision not in DTYPES:
        raise ValueError(f"unknown precision '{precision}': it is one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def precision_of(dtype: torch.dtype) -> Precision:
    """The precision whose activations have this type; ValueError if there is none."""
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype == torch.float32:
        return "fp32"
    raise ValueError(f"no precision computes in {dtype}")
