"""Keeping experts equally busy: the bias rules, which need no auxiliary loss, and all auxiliary losses.

Bias rule (arXiv 2408.15664 algorithm 1; V3 §2.1.2): after each global batch b_i += γ·sign(mean load − load_i).

Losses, for N tokens with scores s [N, E], each token using A experts; f counts choices and has no gradient:

    sequence       Σ f_i P_i per sequence, f_i = E/(A T) #(top-A of the unbiased s has i), P_i = mean_t s_i/Σ_j s_j   V3
    expert         Σ f_i P_i, f_i = E/(A T) #(i was chosen)                Switch eq. 4, DeepSeekMoE eq. 12–14
    first_choice   E Σ (c_i/N) m_i, c_i first choices of i, m_i = P_i      GShard algorithm 1, times E² as in its code
    device         Σ_D f'_D P'_D, f' the mean of f in the group, P' the sum of P            DeepSeekMoE eq. 15–17
    communication  Σ_D f''_D P''_D, f'' = D/(M T) #(tokens sent to the group), P'' = P'     V2 eq. 29–31
    importance     CV(Σ_t g_ti)², g the weights of the chosen              Shazeer eq. 6–7
    load           CV(Σ_t P(t, i))², the chance of being chosen if i's noise were drawn again     Shazeer eq. 8–11
    z              mean_t logsumexp(h_t)²                                  ST-MoE eq. 5

All functions here are pure; the training step itself calls `updated_bias`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.config import BalanceTerm, ModelConfig
from moestro.routing.router import Routes
from moestro.routing.selection import find_best


def count_loads(ids: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """ids [N, A] -> tokens per expert [E] int64, counting the rows where `valid` [N] holds."""
    counted = torch.ones_like(ids) if valid is None else valid[:, None].to(ids.dtype).expand_as(ids)
    return ids.new_zeros(num_experts).scatter_add_(0, ids.flatten(), counted.flatten())


def updated_bias(bias: Tensor, loads: Tensor, speed: float, rule: str = "sign") -> Tensor:
    """bias [E] after one step: it falls for overloaded experts and rises for underloaded ones.

    `loads` [E] are counts over the global batch. `sign` moves each bias by `speed`, `error` by
    speed · (mean − load) / mean. Loads are compared as integers (load·E against the total), so that an expert exactly
    at the mean does not move.
    """
    error = loads.sum() - loads * len(loads)
    if rule == "error":
        return bias + speed * (error / loads.sum().clamp(min=1)).to(bias.dtype)
    return bias + speed * error.sign().to(bias.dtype)


def balance_loss(term: BalanceTerm, routes: Routes, config: ModelConfig, valid: Tensor, num_sequences: int) -> Tensor:
    """One term, without its weight, for one router and one forward pass; rows outside `valid` [N] do not count.

    `sequence` and terms with over="sequence" are sums over sequences, `z` is a sum over tokens, and all others are the
    loss itself.
    """
    match term.kind:
        case "sequence":
            return sequence_balance_loss(routes.scores, config.top_k, num_sequences, valid)
        case "expert" | "device" | "communication":
            parts = num_sequences if term.over == "sequence" else 1
            split = [t.unflatten(0, (parts, -1)) for t in (routes.scores, routes.ids, valid)]
            return share_loss(term.kind, *split, num_groups=config.num_groups, top_k_groups=config.top_k_groups)
        case "first_choice":
            return first_choice_loss(routes.scores[valid], routes.ids[valid])
        case "importance":
            return importance_loss(routes.ids[valid], routes.weights[valid], config.num_experts)
        case "load":
            if routes.noisy is None or routes.noise_std is None or routes.logits is None:
                return routes.scores.new_zeros(())  # evaluation has no noise
            rows = (routes.logits[valid], routes.noisy[valid], routes.noise_std[valid])
            return load_loss(*rows, top_k=config.top_k)
    assert routes.logits is not None
    return z_loss(routes.logits[valid])


def sequence_balance_loss(scores: Tensor, top_k: int, num_sequences: int, valid: Tensor | None = None) -> Tensor:
    """Σ over sequences of Σ_i f_i P_i (V3 eq. 17–20, without α); divide by the number of sequences in the batch.

    scores [N, E] unbiased, N = num_sequences · T; rows outside `valid` [N] do not count.
    f_i = E/(A·T) · #(tokens whose unbiased top-A has i); P_i = mean of s_i / Σ_j s_j.
    """
    if valid is None:
        valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    ids = find_best(scores.detach(), top_k)
    split = [t.unflatten(0, (num_sequences, -1)) for t in (scores, ids, valid)]
    return share_loss("expert", *split, num_groups=1, top_k_groups=1)


def share_loss(kind: str, scores: Tensor, ids: Tensor, valid: Tensor, *, num_groups: int, top_k_groups: int) -> Tensor:
    """Σ over parts of Σ_i f_i P_i, for experts, for devices, or for the tokens sent to devices.

    scores [S, T, E], ids [S, T, A], valid [S, T]; a part is a sequence or the whole batch.
    """
    num_experts, top_k = scores.shape[-1], ids.shape[-1]
    mask = valid[..., None].to(scores.dtype)
    chosen = torch.zeros_like(scores).scatter_(-1, ids, 1.0) * mask
    length = mask.sum(1).clamp(min=1)
    p = (normalized(scores) * mask).sum(1) / length  # [S, E]
    if kind == "expert":
        return (chosen.sum(1) * num_experts / (top_k * length) * p).sum()
    grouped = chosen.unflatten(-1, (num_groups, -1))
    p = p.unflatten(-1, (num_groups, -1)).sum(-1)  # [S, groups]
    if kind == "device":
        f = grouped.sum(1).mean(-1) * num_experts / (top_k * length)
    else:
        f = grouped.amax(-1).sum(1) * num_groups / (top_k_groups * length)
    return (f * p).sum()


def first_choice_loss(scores: Tensor, ids: Tensor) -> Tensor:
    """E Σ_i (c_i / N) m_i over all tokens: scores [N, E], ids [N, A] with the best first (GShard algorithm 1)."""
    num_tokens, num_experts = max(len(scores), 1), scores.shape[-1]
    first = torch.bincount(ids[:, 0], minlength=num_experts).to(scores.dtype) / num_tokens
    return num_experts * (first * normalized(scores).sum(0) / num_tokens).sum()


def normalized(scores: Tensor) -> Tensor:
    """scores [..., E] divided by their sum."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def squared_variation(values: Tensor) -> Tensor:
    """CV² of values [E]: variance over squared mean."""
    return values.var(unbiased=False) / (values.mean() ** 2 + 1e-20)


def importance_loss(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """CV² of each expert's summed weights: ids, weights [N, A] (Shazeer eq. 6–7)."""
    gates = weights.new_zeros(len(ids), num_experts).scatter(1, ids, weights)
    return squared_variation(gates.sum(0))


def load_loss(logits: Tensor, noisy: Tensor, noise_std: Tensor, *, top_k: int) -> Tensor:
    """CV² of the smooth load (Shazeer eq. 8–11); logits without noise, noisy, noise_std: [N, E].

    P(t, i) = Φ((h_i − kth_excluding(H, k, i)) / std_i) with H the noisy logits. The k-th largest of the others is the
    (k+1)-th of all if i is among the top k, else the k-th.
    """
    best = noisy.topk(top_k + 1, dim=-1)
    among = torch.zeros_like(noisy, dtype=torch.bool).scatter_(1, best.indices[:, :top_k], True)
    others = torch.where(among, best.values[:, top_k, None], best.values[:, top_k - 1, None])
    chance = torch.special.ndtr((logits - others) / noise_std.clamp(min=1e-6))
    return squared_variation(chance.sum(0))


def z_loss(logits: Tensor) -> Tensor:
    """Σ over tokens of logsumexp(h)²: logits [N, E]; divide by the number of tokens (ST-MoE eq. 5)."""
    return logits.logsumexp(-1).square().sum()
