"""The large figures of a report: loads, biases and domains of every expert, quantised for the page.

Arrays travel as base64 of little-endian integers, cut to a budget of cells, so that 61 layers of 256 experts
stay within a few megabytes: fewer frames and points, never fewer experts.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.routing.stats import specialisation

MAX_FRAMES, FRAME_CELLS = 200, 800_000
MAX_BIAS_POINTS, BIAS_CELLS = 400, 400_000
DOMAIN_CELLS = 200_000
TOP_EXPERTS = 5

Figure = dict[str, Any]
Floats = NDArray[np.float64]


def load_frames(routing: NDArray[np.void], layers: Sequence[str], tokens: Floats) -> Figure:
    """Loads over time as ratios to the layer's mean: frames of equal runs of steps, summed within a run.

    `ratios` is uint16 [T, L, E] in units of 1 / `unit`; a load above zero never becomes 0. `means` [T, L] turn
    ratios back into assignments; `steps` [T, 2] are the first and the last step of a frame.
    """
    num_layers, num_experts = routing["loads"].shape[1:]
    count = min(len(routing), MAX_FRAMES, max(2, FRAME_CELLS // (num_layers * num_experts)))
    spans = list(itertools.pairwise(int(edge) for edge in np.linspace(0, len(routing), count + 1)))
    unit = min(1024, 65535 // num_experts)  # a ratio is at most E
    frames, means = [], []
    for start, stop in spans:
        loads = routing["loads"][start:stop].sum(axis=0, dtype=np.float64)
        mean = loads.mean(axis=1)
        ratio = np.rint(loads / np.where(mean > 0, mean, 1.0)[:, None] * unit)
        frames.append(np.where(loads > 0, np.maximum(ratio, 1), 0).astype("<u2"))
        means.append([round(float(value), 1) for value in mean])
    return {
        "layers": list(layers),
        "experts": num_experts,
        "unit": unit,
        "steps": [[int(routing["step"][a]), int(routing["step"][b - 1])] for a, b in spans],
        "tokens": [float(tokens[b - 1]) for _, b in spans],
        "means": means,
        "ratios": _base64(np.stack(frames)),
    }


def bias_lines(routing: NDArray[np.void], layers: Sequence[str], tokens: Floats) -> Figure | None:
    """Every expert's bias at evenly spaced steps; None when no bias ever moved.

    `values` is uint16 [L, E, P] between `low` [L] and `high` [L] of its layer.
    """
    num_layers, num_experts = routing["biases"].shape[1:]
    count = min(len(routing), MAX_BIAS_POINTS, max(2, BIAS_CELLS // (num_layers * num_experts)))
    picked = np.unique(np.linspace(0, len(routing) - 1, count).round().astype(int))
    biases = np.nan_to_num(np.stack([routing["biases"][index] for index in picked], axis=-1)).astype(np.float64)
    if not biases.any():
        return None
    low, high = biases.min(axis=(1, 2)), biases.max(axis=(1, 2))
    span = np.where(high > low, high - low, 1.0)
    scaled = np.rint((biases - low[:, None, None]) / span[:, None, None] * 65535).astype("<u2")
    return {
        "layers": list(layers),
        "experts": num_experts,
        "tokens": [float(value) for value in tokens[picked]],
        "low": low.tolist(),
        "high": high.tolist(),
        "values": _base64(scaled),
    }


def domain_figure(names: Sequence[str], layers: Sequence[str], step: int, loads: NDArray[np.uint64]) -> Figure:
    """Experts' preferences for domains after one evaluation, `loads` [D, L, E].

    `log2` is int16 [D, L, E] in thousandths, `counts` uint32. With more domains than the budget holds, the
    largest are kept (`left_out` counts the others); the ratios are still relative to the mean of all domains.
    """
    preference = specialisation(loads)
    room = max(2, DOMAIN_CELLS // loads[0].size)
    kept = np.sort(np.argsort(-loads.sum(axis=(1, 2), dtype=np.float64), kind="stable")[:room])
    return {
        "names": [names[index] for index in kept],
        "layers": list(layers),
        "experts": int(loads.shape[2]),
        "step": step,
        "left_out": len(names) - len(kept),
        "log2": _base64(np.rint(np.clip(preference[kept], -32, 32) * 1000).astype("<i2")),
        "counts": _base64(np.minimum(loads[kept], 2**32 - 1).astype("<u4")),
    }


def top_experts(names: Sequence[str], layers: Sequence[str], loads: NDArray[np.uint64]) -> list[Figure]:
    """For each domain, the experts of all layers that prefer it most: `{name, tokens, experts: [{layer, ...}]}`."""
    preference = specialisation(loads)
    table = []
    for name, scores, counts in zip(names, preference, loads, strict=True):
        best = np.argsort(-scores, axis=None, kind="stable")[:TOP_EXPERTS]
        cells = [divmod(int(index), scores.shape[1]) for index in best]
        experts = [
            {
                "layer": layers[layer],
                "expert": expert,
                "log2": float(scores[layer, expert]),
                "ratio": float(2 ** scores[layer, expert]),
                "tokens": int(counts[layer, expert]),
            }
            for layer, expert in cells
            if scores[layer, expert] > 0
        ]
        table.append({"name": name, "tokens": int(counts.sum(axis=1).max()), "experts": experts})
    return table


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
