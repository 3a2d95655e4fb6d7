"""Optimizers and schedules: AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest.

Muon (Keller Jordan 2024) replaces a matrix's momentum by the nearest orthogonal matrix, through five Newton–Schulz
steps; experts are batches of matrices, gate and up matrices are orthogonalised separately. Its update is scaled by
0.2·√max(rows, columns) (arXiv 2502.16982), which gives it AdamW's size, so both share one learning rate and decay.

Moments are kept in fp32, or in bf16 as DeepSeek-V3 does (§3.3.3), rounded to nearest. All arithmetic is in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from moestro import machine
from moestro.checkpoints.files import gather
from moestro.config import TrainConfig
from moestro.errors import CheckpointError
from moestro.model.transformer import Transformer

PIECE = 2**18  # values updated together: enough for every thread, and the fp32 moments are 2 MB


def lr_factor(step: int, steps: int, config: TrainConfig, warm_from: int = 0) -> float:
    """Warm-up, stable, decay: the share of the peak learning rate for 0-based `step` of `steps`.

    `warm_from`: where a run whose rate had decayed was given more steps; it warms up anew from there.
    """
    warm = (step - warm_from + 1) / config.warmup_steps if step - warm_from < config.warmup_steps else 1.0
    decay_steps = round(steps * config.decay_fraction)
    left = steps - step
    if left > decay_steps or (warm < 1 and not warm_from):
        return warm
    return min(warm, config.final_lr_ratio + (1 - config.final_lr_ratio) * left / (decay_steps + 1))


def mtp_weight(step: int, steps: int, config: TrainConfig) -> float:
    """λ: 0.3 for the first two thirds, then 0.1 (V3 §4.2: 10T of 14.8T tokens)."""
    return config.mtp_weight if step * 3 < steps * 2 else config.mtp_weight_late


def bias_speed(step: int, steps: int, speed: float, frozen_fraction: float) -> float:
    """γ, or 0 in the last part of the run (V3 §4.2: the last 0.5T of 14.8T tokens)."""
    return 0.0 if step >= steps * (1 - frozen_fraction) else speed


def moment_dtype(config: TrainConfig) -> torch.dtype:
    """The type in which moments are kept."""
    return torch.bfloat16 if config.moments_are_bf16 else torch.float32


class Bf16AdamW(torch.optim.Optimizer):
    """torch's AdamW with moments in bf16; parameters are fp32, contiguous, possibly sharded.

    A piece at a time, moments are widened to fp32, updated by torch's own fused kernel, and rounded. The update uses
    them before they are rounded, as Megatron's precision-aware optimizer does.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        assert parameter.grad is not None
        settings = {key: group[key] for key in ("lr", "weight_decay", "eps")}
        settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        tensors = (parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        for values, gradient, *moments in zip(*(_local(t).view(-1).split(PIECE) for t in tensors), strict=True):
            mean, square = (moment.float() for moment in moments)
            step = state["step"].clone()  # adamw counts it up
            adamw(
                [values],
                [gradient],
                [mean],
                [square],
                [],
                [step],
                amsgrad=False,
                maximize=False,
                fused=True,
                **settings,
            )
            moments[0].copy_(mean)
            moments[1].copy_(square)
        state["step"] += 1


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a batch [..., m, n], by Newton–Schulz computed in `dtype`.

    The quintic's coefficients trade exactness for speed: singular values end between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a·x + (b·gram + c·gram²) x
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters [m, n] or [E, m, n]; `halves` parameters are two matrices in one."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay, "halves": False})
        self.dtype, self.moments = dtype, moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=self.moments)
                momentum = state["momentum"].float().lerp_(parameter.grad, 1 - group["momentum"])
                state["momentum"].copy_(momentum)  # itself where it is fp32
                direction = parameter.grad.lerp(momentum, group["momentum"])  # Nesterov
                if group["halves"]:
                    direction = direction.unflatten(-2, (2, -1))
                update = orthogonalize(direction, self.dtype) * 0.2 * max(direction.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"])


class Optimizers:
    """The optimizers of one model, stepped together, their state readable and writable by parameter name."""

    def __init__(self, model: Transformer, config: TrainConfig) -> None:
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        muon = [p for p, name in self.names.items() if config.optimizer == "muon" and _is_block_matrix(name, p)]
        rest = [p for p in self.names if not any(p is m for m in muon)]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups, has_memory = [g for g in groups if g["params"]], not next(iter(self.names)).is_meta
        moments = moment_dtype(config)
        if moments == torch.bfloat16:
            first: torch.optim.Optimizer = Bf16AdamW(groups, lr=config.lr, betas=config.betas)
        else:
            first = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=has_memory)
        self.all = [first]
        if muon:
            halves = [p for p in muon if "gate_up" in self.names[p]]
            whole = [p for p in muon if "gate_up" not in self.names[p]]
            muon_groups: list[dict[str, Any]] = [{"params": halves, "halves": True}, {"params": whole}]
            groups = [g for g in muon_groups if g["params"]]
            dtype = model.dtype if machine.describe_machine().bf16_is_fast else torch.float32  # torch multiplies here
            self.all.append(Muon(groups, lr=config.lr, weight_decay=config.weight_decay, dtype=dtype, moments=moments))

    def step(self, lr: float) -> None:
        """Update every parameter with learning rate `lr`."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def count_moments(self) -> int:
        """Numbers that the moments of all parameters hold: two each under AdamW, one under Muon."""
        counts = [(optimizer, p.numel()) for optimizer in self.all for g in optimizer.param_groups for p in g["params"]]
        return sum(number if isinstance(optimizer, Muon) else 2 * number for optimizer, number in counts)

    def state_tensors(self) -> dict[str, Tensor]:
        """`parameter/key` -> tensor, for a checkpoint."""
        return {
            f"{self.names[parameter]}/{key}": gather(value)
            for optimizer in self.all
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put `state_tensors` back; CheckpointError when they belong to another model or optimizer."""
        owners = {self.names[p]: (o, p) for o in self.all for g in o.param_groups for p in g["params"]}
        for name, value in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            if parameter_name not in owners:
                raise CheckpointError(f"optimizer state for '{parameter_name}', which this model does not have")
            optimizer, parameter = owners[parameter_name]
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(f"optimizer state {name} has shape {list(value.shape)}")
            optimizer.state[parameter][key] = value.clone()


def _local(tensor: Tensor) -> Tensor:
    """This process's own part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and not name.startswith(("embed.", "head.")) and ".router." not in name
