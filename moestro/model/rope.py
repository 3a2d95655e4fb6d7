"""Rotary position embedding on interleaved pairs, with YaRN (arXiv 2309.00071) as DeepSeek and Hugging Face apply it.

YaRN keeps frequencies that turn often within the original length, divides slow ones by `factor`, and blends in
between. Attention is sharpened by mscale²: through the softmax scale (`mscale_all_dim`) and, where the two mscales
differ, through cos and sin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moestro.config import ModelConfig, RopeConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1, or 1 if factor ≤ 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/√(query width), times mscale² under YaRN."""
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    return scale * yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2


def rope_frequencies(rope: RopeConfig, rope_dim: int, device: torch.device | None = None) -> Tensor:
    """Radians per position for each pair, [R/2] fp32."""
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float32, device=device) / rope_dim
    plain = 1.0 / rope.theta**exponents
    if rope.factor == 1:
        return plain

    def turns_to_pair(turns: float) -> float:
        """The pair index that makes `turns` full turns within the original length."""
        return rope_dim * math.log(rope.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(turns_to_pair(rope.beta_fast)), 0)
    high = min(math.ceil(turns_to_pair(rope.beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)
    slow_share = ramp.clamp(0, 1)
    return plain / rope.factor * slow_share + plain * (1 - slow_share)


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [N] int -> cos, sin [N, R/2] fp32."""
    rope = config.rope
    angles = positions[:, None].float() * rope_frequencies(rope, config.rope_dim, positions.device)
    magnitude = 1.0
    if rope.mscale and rope.mscale_all_dim:
        magnitude = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    elif rope.factor > 1:
        magnitude = yarn_mscale(rope.factor, 1.0)
    return angles.cos() * magnitude, angles.sin() * magnitude
