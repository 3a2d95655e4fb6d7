"""One training step, in the open: forward, backward, clip, optimizer, and the line that moves the router biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro import ops
from moestro.config import TrainConfig
from moestro.data.batches import Batch
from moestro.model.transformer import Transformer
from moestro.parallel.world import ONE, World
from moestro.routing.balance import updated_bias
from moestro.routing.router import mix_seed
from moestro.training.loss import Counts, ForwardResult, attention_batch, compute_loss
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
    world: World = ONE,
) -> StepResult:
    """One step on the global batch; `batches` are this process's micro-batches. Every process gets the same result.

    Batches lie on the host; the model computes where its parameters are. `token_bytes` [V] is the text length of each
    token id. The routers' noise depends only on `noise_seed`, so a resumed run draws the same; it differs for every
    micro-batch of every process.
    """
    model.train()
    optimizers.zero_grad()
    counts = Counts.of(batches, len(model.mtp), world)
    device = next(model.parameters()).device
    sums: Sums | None = None
    for number, batch in enumerate(batches):
        result = compute_loss(
            model,
            batch.to(device),
            counts,
            mtp_weight=mtp_weight,
            attention=attention_batch(batch, mask_documents=config.mask_documents).to(device),
            recompute=config.recompute,
            noise_seed=mix_seed(noise_seed, number * world.size + world.rank),
        )
        result.terms.total.backward()
        found = Sums.of(result)
        sums = found if sums is None else sums + found
    assert sums is not None
    sums = Sums(world.sum(sums.losses), world.sum(sums.counts), world.sum(sums.loads))
    (text_bytes,) = world.sum_numbers([sum(count_bytes(batch.targets(0), token_bytes) for batch in batches)])
    world.sum_gradients(model)

    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    applied = is_finite(grad_norm) and is_finite(sums.losses[0])
    if applied:
        optimizers.step(lr)
        ops.forget()  # casts of the old weights
        rule = model.config.router.bias
        if rule != "none":
            for (_, router), load in zip(model.routers(), sums.loads, strict=True):
                router.bias.copy_(updated_bias(router.bias, load, bias_speed, rule))
    return sums.read(grad_norm, applied, text_bytes)


@dataclass(frozen=True)
class Sums:
    """What a step adds up over micro-batches and processes, as tensors on the model's device.

    losses [5] fp64: total, main, mtp, balance, nll; counts [3] int64: overflow, agreed, compared; loads [L, E] int64.
    """

    losses: Tensor
    counts: Tensor
    loads: Tensor

    @staticmethod
    def of(result: ForwardResult) -> Sums:
        """The sums of one micro-batch."""
        terms = result.terms
        losses = [terms.total.detach(), terms.main, terms.mtp, terms.balance]
        nll = result.nll.sum(dtype=torch.float64)
        return Sums(
            torch.stack([*(term.double() for term in losses), nll]),
            torch.stack([result.overflow, result.agreed, result.compared]),
            result.loads,
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.losses + other.losses, self.counts + other.counts, self.loads + other.loads)

    def read(self, grad_norm: Tensor, applied: bool, text_bytes: int) -> StepResult:
        """The sums as Python numbers, read back once."""
        if self.losses.is_meta:  # there are none
            return StepResult(0.0, 0.0, 0.0, 0.0, 0.0, self.loads, 0, 0.0, text_bytes, None, applied)
        loss, main, mtp, balance, nll = self.losses.tolist()
        overflow, agreed, compared = self.counts.tolist()
        agreement = agreed / compared if compared else None
        norm, loads = float(grad_norm), self.loads.cpu()
        return StepResult(loss, main, mtp, balance, norm, loads, overflow, nll, text_bytes, agreement, applied)


def count_bytes(targets: Tensor, token_bytes: Tensor) -> int:
    """Bytes of text of the targets."""
    return int(token_bytes[targets[targets >= 0]].sum())


def is_finite(value: Tensor) -> bool:
    """Whether a number is finite; one on the meta device has no value and counts as finite."""
    return value.is_meta or bool(value.isfinite())
