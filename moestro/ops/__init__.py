"""The operations that models are made of.

Those of training, with gradients, are in `training/`, and `from moestro import ops` gives them by name. Those of
serving, on packed weights and without gradients, are in `serving/`.
"""

from moestro.ops.training import (
    forget,
    grouped_experts,
    join_heads,
    linear,
    linear_cross_entropy,
    multiplies_bf16,
    packed_attention,
    rms_norm,
    swiglu,
)

__all__ = [
    "forget",
    "grouped_experts",
    "join_heads",
    "linear",
    "linear_cross_entropy",
    "multiplies_bf16",
    "packed_attention",
    "rms_norm",
    "swiglu",
]
