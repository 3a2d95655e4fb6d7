"""The fused operations: one public function each, one signature, two implementations.

`reference.py` is the specification in plain, obvious torch. `fused.py` computes the same with hand-written
backward passes, no padding and little memory. `MOESTRO_OPS=reference` forces the first, for debugging.
Native kernels will join here behind the same signatures.
"""

import os

from moestro.ops import fused, reference

_chosen = reference if os.environ.get("MOESTRO_OPS") == "reference" else fused

grouped_experts = _chosen.grouped_experts
packed_attention = _chosen.packed_attention
linear_cross_entropy = _chosen.linear_cross_entropy

__all__ = ["grouped_experts", "linear_cross_entropy", "packed_attention"]
