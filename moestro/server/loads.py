"""How the experts are used, since the start and lately: the JSON of `/routing`."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.config import ModelConfig
from moestro.routing.stats import dead_experts, load_entropy, max_over_mean

WINDOW_SECONDS, SAMPLE_SECONDS = 30.0, 2.0
Loads = npt.NDArray[np.int64]


def layer_names(config: ModelConfig) -> list[str]:
    """The numbers of the blocks that have experts."""
    return [str(index) for index in config.moe_layers]


class LoadHistory:
    """Counts [layers, experts] since the start, sampled now and then to show their recent growth."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers, self.num_experts, self.top_k = layer_names(config), config.num_experts, config.top_k
        self._samples: deque[tuple[float, Loads]] = deque()

    def add(self, seconds: float, loads: Loads) -> None:
        """Add a sample; drops those older than the window, except the one it begins with."""
        if self._samples and self._samples[-1][1].sum() > loads.sum():
            self._samples.clear()  # the engine was replaced and its counts start over
        if self._samples and seconds - self._samples[-1][0] < SAMPLE_SECONDS:
            return
        self._samples.append((seconds, loads.copy()))
        while len(self._samples) > 1 and self._samples[1][0] <= seconds - WINDOW_SECONDS:
            self._samples.popleft()

    def describe(self, seconds: float, loads: Loads) -> dict[str, Any]:
        """Total and recent figures; `loads` are the current counts."""
        self.add(seconds, loads)
        begin, before = self._samples[0]
        recent = {**self._figures(loads - before), "seconds": round(seconds - begin, 3)}
        return {
            "layers": self.layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "total": self._figures(loads),
            "recent": recent,
        }

    def _figures(self, loads: Loads) -> dict[str, Any]:
        """Figures for some loads; the ratios of a layer without tokens are null."""
        if not self.layers:
            return {"tokens": 0, "load": [], "entropy": [], "max_over_mean": [], "dead": []}
        return {
            "tokens": int(loads[0].sum()) // self.top_k,
            "load": loads.tolist(),
            "entropy": [_number(value) for value in load_entropy(loads)],
            "max_over_mean": [_number(value) for value in max_over_mean(loads)],
            "dead": dead_experts(loads).tolist(),
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
