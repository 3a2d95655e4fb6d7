"""One training step, in the open: forward, backward, clip, optimizer, and the line that moves the router biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.config import TrainConfig
from moestro.data.batches import Batch
from moestro.model.transformer import Transformer
from moestro.routing.balance import updated_bias
from moestro.training.loss import Counts, compute_loss
from moestro.training.optim import Optimizers


@dataclass(frozen=True)
class StepResult:
    """What a step did. Losses in nats per token over the global batch; loads [L, E] choices per router and expert,
    `overflow` of which found no room; `nll` and `text_bytes` summed over targets; `applied` is False where a
    non-finite gradient was thrown away."""

    loss: float
    main: float
    mtp: float
    balance: float
    grad_norm: float
    loads: Tensor
    overflow: int
    nll: float
    text_bytes: int
    agreement: float | None
    applied: bool


def train_step(
    model: Transformer,
    optimizers: Optimizers,
    batches: Sequence[Batch],
    config: TrainConfig,
    *,
    token_bytes: Tensor,
    lr: float,
    mtp_weight: float,
    bias_speed: float,
    noise_seed: int = 0,
) -> StepResult:
    """One step on the global batch `batches`. `token_bytes` [V] is the text length of each token id.

    Noise of the routers is drawn from `noise_seed` alone, so that a resumed run draws the same.
    """
    model.train()
    torch.manual_seed(noise_seed)
    counts = Counts.of(batches, len(model.mtp))
    totals = torch.zeros(4, dtype=torch.float64)
    loads: Tensor | None = None
    nll, text_bytes, overflow, agreed, compared = 0.0, 0, 0, 0, 0
    optimizers.zero_grad()
    for batch in batches:
        result = compute_loss(
            model,
            batch,
            counts,
            mtp_weight=mtp_weight,
            mask_documents=config.mask_documents,
            recompute=config.recompute,
        )
        result.terms.total.backward()
        terms = result.terms
        totals += torch.tensor([float(t.detach()) for t in (terms.total, terms.main, terms.mtp, terms.balance)])
        loads = result.loads if loads is None else loads + result.loads
        overflow += result.overflow
        nll += float(result.nll.sum(dtype=torch.float64))
        text_bytes += int(token_bytes[batch.targets(0).clamp(min=0)][batch.targets(0) >= 0].sum())
        agreed, compared = agreed + result.agreed, compared + result.compared
    assert loads is not None

    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    applied = math.isfinite(grad_norm) and math.isfinite(float(totals[0]))
    if applied:
        optimizers.step(lr)
        rule = model.config.router.bias
        if rule != "none":
            for (_, router), load in zip(model.routers(), loads, strict=True):
                router.bias.copy_(updated_bias(router.bias, load, bias_speed, rule))
    loss, main, mtp, balance = totals.tolist()
    agreement = agreed / compared if compared else None
    return StepResult(loss, main, mtp, balance, grad_norm, loads, overflow, nll, text_bytes, agreement, applied)
