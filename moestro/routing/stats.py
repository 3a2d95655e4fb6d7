"""How evenly experts are used, and for which domains: figures computed from loads.

A load is the number of (token, choice) assignments that an expert received. Everything here is a pure
function of numpy arrays whose last axis is the expert (`tensor.numpy()` for torch), computed in float64.

A layer that saw no token has no balance: its ratios and its entropy are NaN (average with `np.nanmean`), and
all its experts count as dead. Figures over one batch and over a whole validation set differ (a batch is
noisier, and may hold one domain only), so say beside every number which loads it was computed from.

Source: MaxVio from arXiv 2408.15664 (auxiliary-loss-free balancing), section 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def max_over_mean(loads: ArrayLike) -> Floats:
    """Largest load over mean load, `[..., E] -> [...]`: 1 is perfect balance, E is one expert alone."""
    counts = _counts(loads)
    with np.errstate(invalid="ignore"):
        return np.asarray(counts.max(axis=-1) / counts.mean(axis=-1), np.float64)


def max_vio(loads: ArrayLike) -> Floats:
    """Maximal violation (max - mean) / mean, `[..., E] -> [...]`: 0 is perfect balance (arXiv 2408.15664)."""
    return max_over_mean(loads) - 1.0


def dead_experts(loads: ArrayLike) -> NDArray[np.int64]:
    """Number of experts without a single token, `[..., E] -> [...]`."""
    return np.asarray((_counts(loads) == 0).sum(axis=-1), np.int64)


def load_entropy(loads: ArrayLike) -> Floats:
    """Entropy of the load shares over log E, `[..., E] -> [...]`: 1 is uniform, 0 is one expert alone.

    A layer of a single expert is uniform by definition.
    """
    counts = _counts(loads)
    num_experts = counts.shape[-1]
    total = counts.sum(axis=-1)
    if num_experts == 1:
        return np.where(total > 0, 1.0, np.nan)
    with np.errstate(invalid="ignore"):
        share = counts / total[..., None]
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return np.asarray(entropy / np.log(num_experts), np.float64)


def specialisation(domain_loads: ArrayLike, smoothing: float = 1.0) -> Floats:
    """Preference of experts for domains, `[D, L, E] -> [D, L, E]`, in log2: +1 is twice the mean share.

    With n the load of a domain in a layer's expert, N = sum over experts of n, and m the mean over domains of
    n / N (unweighted, so a large domain does not dominate; domains without tokens in the layer are left out)::

        log2( (n + s m) / ((N + s) m) ),    s = smoothing * E

    that is, the domain's share shrunk towards the mean share with the weight of s assignments. So little evidence
    gives a value near 0, no evidence (a dead expert, a domain without tokens) exactly 0. No value exceeds log2 D.
    """
    counts = _counts(domain_loads)
    if counts.ndim != 3:
        raise ValueError(f"domain_loads must be [D, L, E], got shape {counts.shape}")
    if smoothing <= 0:
        raise ValueError(f"smoothing must be positive, got {smoothing}")
    total = counts.sum(axis=-1, keepdims=True)
    share = counts / np.maximum(total, 1.0)
    mean = share.sum(axis=0) / np.maximum((total > 0).sum(axis=0), 1)
    prior = smoothing * counts.shape[-1]
    ratio = (counts + prior * mean) / ((total + prior) * np.where(mean > 0, mean, 1.0))
    return np.asarray(np.log2(np.where(mean > 0, ratio, 1.0)), np.float64)


def _counts(loads: ArrayLike) -> Floats:
    counts: NDArray[Any] = np.asarray(loads, dtype=np.float64)
    if counts.ndim == 0 or counts.shape[-1] == 0:
        raise ValueError(f"loads must be [..., E] with at least one expert, got shape {counts.shape}")
    return counts
