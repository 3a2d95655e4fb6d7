"""The fused operations: one public function each, one signature, up to three implementations.

`reference.py` is the specification in plain, obvious torch. `fused.py` computes the same with hand-written backward
passes, no padding and little memory. `native.py`, `native_attention.py` and `native_rows.py` call the compiled kernels
for what they cover, where they were built. `MOESTRO_OPS=reference` or `MOESTRO_OPS=fused` forces one of the first two;
operations that `fused.py` lacks are then the reference.
"""

import os

import torch

from moestro import machine
from moestro.errors import ConfigError
from moestro.ops import library
from moestro.ops.training import fused, native, native_attention, native_rows, reference

_wish = os.environ.get("MOESTRO_OPS")
if _wish not in (None, "", "reference", "fused"):
    raise ConfigError(f"MOESTRO_OPS={_wish} is neither reference nor fused")
_plain = reference if _wish == "reference" else fused
_fastest = _plain if _wish else native
_rows = reference if _wish else native_rows

grouped_experts = _fastest.grouped_experts
linear = _fastest.linear
linear_cross_entropy = _fastest.linear_cross_entropy
packed_attention = _plain.packed_attention if _wish else native_attention.packed_attention
rms_norm = _rows.rms_norm
swiglu = _rows.swiglu
join_heads = _rows.join_heads


def multiplies_bf16() -> bool:
    """Whether products in bf16 take about the time of fp32's: by instructions, or by kernels that widen them."""
    widened = _fastest is native and library.load_library() is not None and library.multiplies_faster(torch.bfloat16)
    return machine.describe_machine().bf16_is_fast or widened


__all__ = [
    "grouped_experts",
    "join_heads",
    "linear",
    "linear_cross_entropy",
    "multiplies_bf16",
    "packed_attention",
    "rms_norm",
    "swiglu",
]
