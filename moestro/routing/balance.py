"""Keeping experts equally busy: the bias rule without an auxiliary loss, and the small loss beside it.

Bias rule (arXiv 2408.15664 algorithm 1; V3 §2.1.2): after each global batch b_i += γ·sign(mean load − load_i).
Sequence-wise loss (V3 eq. 17–20): L = α Σ_i f_i P_i per sequence, with f counted on the top-k of *unbiased* scores.
Everything here is a function of its arguments; the training step calls `updated_bias` in plain sight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_loads(ids: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """ids [N, A] -> tokens per expert [E] int64, of the rows where `valid` [N] holds."""
    chosen = ids if valid is None else ids[valid]
    return torch.bincount(chosen.flatten(), minlength=num_experts)


def updated_bias(bias: Tensor, loads: Tensor, speed: float) -> Tensor:
    """bias [E] after one step: overloaded experts lose `speed`, underloaded ones gain it, the mean keeps.

    `loads` [E] are counts over the global batch. Compared as integers (load·E against the total), so that an
    expert exactly at the mean does not move.
    """
    error = loads.sum() - loads * len(loads)
    return bias + speed * error.sign().to(bias.dtype)


def sequence_balance_loss(scores: Tensor, top_k: int, num_sequences: int, valid: Tensor | None = None) -> Tensor:
    """Σ over sequences of Σ_i f_i P_i (V3 eq. 17–20, without α); divide by the number of sequences in the batch.

    scores [N, E] unbiased, N = num_sequences · T; rows outside `valid` [N] do not count.
    f_i = E/(A·T) · #(tokens whose unbiased top-A has i); P_i = mean of s_i / Σ_j s_j.
    """
    num_experts = scores.shape[-1]
    chosen = torch.zeros_like(scores).scatter_(1, scores.detach().topk(top_k, dim=-1).indices, 1.0)
    share = scores / scores.sum(-1, keepdim=True)
    if valid is None:
        valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    mask = valid[:, None].to(scores.dtype)
    chosen, share, mask = (t.unflatten(0, (num_sequences, -1)) for t in (chosen * mask, share * mask, mask))
    length = mask.sum(1).clamp(min=1)
    f = chosen.sum(1) * num_experts / (top_k * length)
    p = share.sum(1) / length
    return (f * p).sum()
