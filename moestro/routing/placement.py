"""Where the copies of experts are: each physical slot holds a copy of one logical expert.

Routers choose logical experts; physical slots are computed, sent and kept in memory. A `Placement` says which expert
each slot holds, layer by layer, and `place_routes` maps expert ids to slots. It is a pure function: the same ids and
placement give the same slots on every rank. Copies of an expert are equal, so results do not depend on the choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Choice = Literal["first", "in_turn"]  # which copy row n uses: the first, or number n mod copies


@dataclass(frozen=True, eq=False)
class Placement:
    """`physical_to_logical` [layers, slots] int64: the expert whose copy each slot holds.

    ValueError unless every layer has a copy of each of its `num_experts` experts, and nothing else.
    """

    physical_to_logical: Tensor
    num_experts: int

    def __post_init__(self) -> None:
        table = self.physical_to_logical
        if table.dim() != 2 or table.dtype != torch.int64:
            raise ValueError(f"a placement is int64 [layers, slots], not {table.dtype} {list(table.shape)}")
        if bool(((table < 0) | (table >= self.num_experts)).any()):
            raise ValueError(f"a placement names an expert outside of 0 to {self.num_experts - 1}")
        missing = (self.replicas == 0).nonzero()
        if len(missing):
            layer, expert = missing[0].tolist()
            raise ValueError(f"expert {expert} of layer {layer} is in no slot")

    @staticmethod
    def identity(num_layers: int, num_experts: int) -> Placement:
        """One copy of each expert; expert e is in slot e."""
        return Placement(torch.arange(num_experts).repeat(num_layers, 1), num_experts)

    @property
    def num_slots(self) -> int:
        """Slots per layer."""
        return self.physical_to_logical.shape[1]

    @cached_property
    def replicas(self) -> Tensor:
        """Number of copies of each expert, [layers, E] int64."""
        table = self.physical_to_logical
        counts = table.new_zeros(len(table), self.num_experts)
        return counts.scatter_add_(1, table, torch.ones_like(table))

    @cached_property
    def logical_to_physical(self) -> Tensor:
        """Slots of each expert in ascending order, [layers, E, most copies] int64, padded with -1."""
        table, counts = self.physical_to_logical, self.replicas
        slots = table.argsort(dim=1, stable=True)
        expert = table.gather(1, slots)
        before = (counts.cumsum(1) - counts).gather(1, expert)  # slots of lower-numbered experts
        copy = torch.arange(self.num_slots, device=table.device) - before
        out = table.new_full((*counts.shape, int(counts.max()) if counts.numel() else 0), -1)
        layer = torch.arange(len(table), device=table.device)[:, None]
        out[layer, expert, copy] = slots
        return out


def place_routes(ids: Tensor, placement: Placement, layer: int, *, choice: Choice = "first") -> Tensor:
    """Logical ids [N, A] int64 of a layer's routes -> slots [N, A].

    Id E marks a dropped choice; it becomes the number of slots, which means the same.
    """
    slots = placement.logical_to_physical[layer].to(ids.device)
    slots = F.pad(slots, (0, 0, 0, 1), value=placement.num_slots)
    if choice == "first":
        return slots[:, 0][ids]
    copies = F.pad(placement.replicas[layer].to(ids.device), (0, 1), value=1)
    row = torch.arange(len(ids), device=ids.device)[:, None]
    return slots[ids, row % copies[ids]]
