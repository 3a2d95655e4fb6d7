"""The cache of one sequence: `cache_width` values per token and layer (for MLA the latent and one rotated key),
in one tensor per layer that grows by doubling. The cache belongs to whoever generates, never to the model."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.model.attention import cache_width


class GrowingLayer:
    """Rows of one layer: `extend` appends and returns all."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.rows = torch.empty(64, width, dtype=dtype)
        self.length = 0

    def extend(self, rows: Tensor) -> Tensor:
        """rows [T, W] -> [S, W], everything cached with `rows` last."""
        needed = self.length + len(rows)
        if needed > len(self.rows):
            grown = self.rows.new_empty(max(needed, 2 * len(self.rows)), self.rows.shape[1])
            grown[: self.length] = self.rows[: self.length]
            self.rows = grown
        self.rows[self.length : needed] = rows
        self.length = needed
        return self.rows[:needed]


def new_cache(config: ModelConfig, dtype: torch.dtype) -> list[GrowingLayer]:
    """An empty cache, one entry per main layer."""
    return [GrowingLayer(cache_width(config), dtype) for _ in range(config.num_layers)]
