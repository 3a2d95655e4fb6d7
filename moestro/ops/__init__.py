"""The operations that models are made of.

Training operations, with gradients, are in `training/`; `from moestro import ops` gives them by name. Serving
operations, on packed weights and without gradients, are in `serving/`.
"""

from moestro.ops.fp8 import dequantize_fp8, quantize_fp8
from moestro.ops.training import (
    forget,
    grouped_experts,
    join_heads,
    linear,
    linear_cross_entropy,
    mlp,
    multiplies_bf16,
    packed_attention,
    rms_norm,
    swiglu,
)

__all__ = [
    "dequantize_fp8",
    "forget",
    "grouped_experts",
    "join_heads",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "multiplies_bf16",
    "packed_attention",
    "quantize_fp8",
    "rms_norm",
    "swiglu",
]
