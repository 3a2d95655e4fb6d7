"""The training objective: next token, tokens further ahead (MTP), balance.

    total = main + λ/D Σ_k mtp_k + Σ_layers α · balance          (V3 eq. 17–25)

Every term is divided by a count over the *global* batch, given from outside: the gradient of a step is the same
however the batch is cut into micro-batches or dealt out to processes, and recompute cannot change it. A target's weight
multiplies its loss; the count is the number of targets, whatever their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.data.batches import PADDING, Batch
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Targets, Transformer
from moestro.parallel.world import ONE, World
from moestro.routing.balance import balance_loss, count_loads
from moestro.routing.router import Routes


@dataclass(frozen=True)
class LossTerms:
    """Shares of a step's losses, in nats per token: `total` has the gradient, the others are for display."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    total: Tensor


@dataclass(frozen=True)
class Counts:
    """The counts that normalise a global batch: targets per depth (0 is the next token), sequences, tokens."""

    targets: tuple[int, ...]
    sequences: int
    tokens: int

    @staticmethod
    def of(batches: Sequence[Batch], depth: int, world: World = ONE) -> Counts:
        """Counts over all micro-batches of a step, including those of other processes."""
        own = [sum(int((b.targets(k) >= 0).sum()) for b in batches) for k in range(depth + 1)]
        tokens = sum(int((b.segments[:, :-1] != PADDING).sum()) for b in batches)
        *targets, sequences, tokens = world.sum_numbers([*own, sum(len(b.tokens) for b in batches), tokens])
        return Counts(tuple(targets), sequences, tokens)


@dataclass(frozen=True)
class Routed:
    """The routes of one router, which of its rows count, and how many count in the global batch."""

    routes: Routes
    valid: Tensor
    tokens: int


@dataclass(frozen=True)
class ForwardResult:
    """One micro-batch: its loss terms; loads [L, E] of every router, including choices that found no room, and the
    number of those; nll [N] per token in nats, 0 without a target; how often MTP depth 1 and the main head name the
    same token, of how many. All are tensors: nothing is read back."""

    terms: LossTerms
    loads: Tensor
    overflow: Tensor
    nll: Tensor
    agreed: Tensor
    compared: Tensor


def attention_batch(batch: Batch, *, mask_documents: bool) -> AttentionBatch:
    """Rows as they are, or cut at document boundaries."""
    inputs = batch.inputs
    if not mask_documents:
        return AttentionBatch.causal(len(inputs), inputs.shape[1], device=inputs.device)
    return AttentionBatch.packed(batch.segments[:, :-1])


def tokens_ahead(batch: Batch, depth: int) -> Tensor:
    """The tokens `depth` positions ahead of each input [N]; 0 past the end of a row, where targets do not count."""
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
    noise_seed: int = 0,
    attention: AttentionBatch | None = None,
    replay: Sequence[Tensor] | None = None,
) -> ForwardResult:
    """Forward one micro-batch and compute its share of every loss term.

    `attention`: which tokens attend to which, if already known. `replay`: see `Transformer.forward`.
    """
    depth = len(model.mtp)
    if attention is None:
        attention = attention_batch(batch, mask_documents=mask_documents)
    targets = [Targets(batch.targets(k).flatten(), _flat(batch.target_weights(k))) for k in range(depth + 1)]
    output = model(
        batch.inputs.flatten(),
        attention,
        ahead=[tokens_ahead(batch, k) for k in range(1, depth + 1)],
        targets=targets,
        replay=replay,
        recompute=recompute,
        noise_seed=noise_seed,
    )
    assert output.scores is not None
    main = output.scores.total / max(counts.targets[0], 1)
    mtp, choices = torch.zeros((), device=main.device), []
    for extra, count in zip(output.ahead, counts.targets[1:], strict=True):
        assert extra.scores is not None
        mtp = mtp + extra.scores.total / max(count, 1) / depth
        choices.append(extra.scores.argmax)

    present = (batch.segments[:, :-1] != PADDING).flatten()
    routed = [Routed(routes, present, counts.tokens) for routes in output.routes]
    for k, extra in enumerate(output.ahead, start=1):
        routed += [Routed(routes, targets[k].ids >= 0, counts.targets[k]) for routes in extra.routes]
    balance = _balance_loss(model, routed, batch, counts)
    terms = LossTerms(main.detach(), mtp.detach(), balance.detach(), main + mtp_weight * mtp + balance)
    ids = [target.ids for target in targets]
    agreed, compared = _agreement(output.scores.argmax, choices, ids, batch.inputs.shape[1])
    lost = [routes.overflow for routes in (entry.routes for entry in routed) if routes.overflow is not None]
    overflow = torch.stack(lost).sum() if lost else torch.zeros((), dtype=torch.int64, device=main.device)
    return ForwardResult(terms, _loads(model, routed, main.device), overflow, output.scores.nll, agreed, compared)


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.flatten()


def _balance_loss(model: Transformer, routed: list[Routed], batch: Batch, counts: Counts) -> Tensor:
    total = torch.zeros((), device=batch.tokens.device)
    for term in model.config.router.balance:
        for entry in routed:
            divisor = 1 if term.needs_whole_batch else entry.tokens if term.kind == "z" else counts.sequences
            loss = balance_loss(term, entry.routes, model.config, entry.valid, len(batch.tokens))
            total = total + term.weight * loss / max(divisor, 1)
    return total


def _loads(model: Transformer, routed: list[Routed], device: torch.device) -> Tensor:
    num_experts = model.config.num_experts
    loads = [count_loads(entry.routes.ids, num_experts, entry.valid) for entry in routed]
    return torch.stack(loads) if loads else torch.zeros(0, num_experts, dtype=torch.int64, device=device)


def _agreement(main: Tensor, choices: list[Tensor], targets: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """MTP depth 1 at position i and the main head at i + 1 both name token i + 2: the share that greedy drafts win."""
    if not choices:
        none = torch.zeros((), dtype=torch.int64, device=main.device)
        return none, none
    drafted, chosen = choices[0].view(-1, length)[:, :-1], main.view(-1, length)[:, 1:]
    valid = targets[1].view(-1, length)[:, :-1] >= 0
    return ((drafted == chosen) & valid).sum(), valid.sum()
