"""The training objective: next token, tokens further ahead (MTP), balance.

    total = main + λ/D Σ_k mtp_k + Σ_layers α · balance          (V3 eq. 17–25)

Every term is divided by a count over the *global* batch, given from outside: the gradient of a step is the same
however the batch is cut into micro-batches, and recompute cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro import ops
from moestro.data.batches import PADDING, Batch
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer
from moestro.routing.balance import balance_loss, count_loads
from moestro.routing.router import Routes


@dataclass(frozen=True)
class LossTerms:
    """Shares of a step's losses, in nats per token: `total` has the gradient, the others are for the eye."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    total: Tensor


@dataclass(frozen=True)
class Counts:
    """What a global batch is normalised by: targets per depth (0 is the next token), sequences, tokens."""

    targets: tuple[int, ...]
    sequences: int
    tokens: int

    @staticmethod
    def of(batches: Sequence[Batch], depth: int) -> Counts:
        """Counts over all micro-batches of a step."""
        targets = tuple(sum(int((b.targets(k) >= 0).sum()) for b in batches) for k in range(depth + 1))
        tokens = sum(int((b.segments[:, :-1] != PADDING).sum()) for b in batches)
        return Counts(targets, sum(len(b.tokens) for b in batches), tokens)


@dataclass(frozen=True)
class Routed:
    """The routes of one router, its rows that count, and how many count in the global batch."""

    routes: Routes
    valid: Tensor
    tokens: int


@dataclass(frozen=True)
class ForwardResult:
    """One micro-batch: its loss terms; loads [L, E] of every router, choices that found no room included, and their
    number; nll [N] per token in nats, 0 where no target; how often MTP depth 1 and the main head name the same token,
    of how many."""

    terms: LossTerms
    loads: Tensor
    overflow: int
    nll: Tensor
    agreed: int
    compared: int


def attention_batch(batch: Batch, *, mask_documents: bool) -> AttentionBatch:
    """Rows as they are, or cut at document boundaries."""
    inputs = batch.inputs
    if not mask_documents:
        return AttentionBatch.causal(*inputs.shape)
    return AttentionBatch.packed(batch.segments[:, :-1])


def tokens_ahead(batch: Batch, depth: int) -> Tensor:
    """The tokens `depth` positions ahead of each input [N]; 0 past the end of a row, where no target is counted."""
    length = batch.inputs.shape[1]
    return F.pad(batch.tokens[:, depth : depth + length], (0, max(depth - 1, 0))).flatten()


def compute_loss(
    model: Transformer,
    batch: Batch,
    counts: Counts,
    *,
    mtp_weight: float,
    mask_documents: bool = True,
    recompute: bool = False,
) -> ForwardResult:
    """Forward one micro-batch and form its share of every loss term."""
    depth = len(model.mtp)
    attention = attention_batch(batch, mask_documents=mask_documents)
    output = model(batch.inputs.flatten(), attention, recompute=recompute)
    targets = [batch.targets(k).flatten() for k in range(depth + 1)]
    main_sum, nll, main_choice = ops.linear_cross_entropy(output.hidden, model.head_weight, targets[0])
    main = main_sum / max(counts.targets[0], 1)

    outputs = model.forward_mtp(
        output.hidden, [tokens_ahead(batch, k) for k in range(1, depth + 1)], attention, recompute=recompute
    )
    mtp, choices = torch.zeros((), device=main.device), []
    for k, extra in enumerate(outputs, start=1):
        extra_sum, _, choice = ops.linear_cross_entropy(extra.hidden, model.head_weight, targets[k])
        mtp = mtp + extra_sum / max(counts.targets[k], 1) / depth
        choices.append(choice)

    present = (batch.segments[:, :-1] != PADDING).flatten()
    routed = [Routed(routes, present, counts.tokens) for routes in output.routes]
    for k, extra in enumerate(outputs, start=1):
        routed += [Routed(routes, targets[k] >= 0, counts.targets[k]) for routes in extra.routes]
    balance = _balance_loss(model, routed, batch, counts)
    terms = LossTerms(main.detach(), mtp.detach(), balance.detach(), main + mtp_weight * mtp + balance)
    agreed, compared = _agreement(main_choice, choices, targets, batch.inputs.shape[1])
    overflow = sum(int(routes.overflow) for routes in (r.routes for r in routed) if routes.overflow is not None)
    return ForwardResult(terms, _loads(model, routed), overflow, nll, agreed, compared)


def _balance_loss(model: Transformer, routed: list[Routed], batch: Batch, counts: Counts) -> Tensor:
    total = torch.zeros((), device=batch.tokens.device)
    for term in model.config.router.balance:
        for entry in routed:
            divisor = 1 if term.needs_whole_batch else entry.tokens if term.kind == "z" else counts.sequences
            loss = balance_loss(term, entry.routes, model.config, entry.valid, len(batch.tokens))
            total = total + term.weight * loss / max(divisor, 1)
    return total


def _loads(model: Transformer, routed: list[Routed]) -> Tensor:
    num_experts = model.config.num_experts
    loads = [count_loads(entry.routes.ids, num_experts, entry.valid) for entry in routed]
    return torch.stack(loads) if loads else torch.zeros(0, num_experts, dtype=torch.int64)


def _agreement(main: Tensor, choices: list[Tensor], targets: list[Tensor], length: int) -> tuple[int, int]:
    """MTP depth 1 at position i and the main head at i + 1 both name token i + 2: the share that greedy drafts win."""
    if not choices:
        return 0, 0
    drafted, chosen = choices[0].view(-1, length)[:, :-1], main.view(-1, length)[:, 1:]
    valid = targets[1].view(-1, length)[:, :-1] >= 0
    return int(((drafted == chosen) & valid).sum()), int(valid.sum())
