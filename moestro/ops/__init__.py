"""The operations that models are made of: those of training, with gradients, in `training/`; those of serving, on packed
weights and without, in `serving/`. `from moestro import ops` gives the former by name."""

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
