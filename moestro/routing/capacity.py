"""Limited capacity: which choices exceed it, ordered by position in the batch or by affinity.

A unit is an expert (GShard, Switch) or a device (DeepSeek-V2 §2.2.4). By position, all first choices come before all
second ones, and earlier tokens before later ones. By affinity, the lowest are dropped first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def find_overflow(
    units: Tensor, wanted: Tensor, room: int, *, affinity: Tensor | None = None, spared: Tensor | None = None
) -> Tensor:
    """Choices that find no room, [N, A] bool.

    units [N, A] int64, wanted [N, A] bool (the others take no room), affinity [N, A] or None to order by position.
    spared [N] bool: tokens that are served first, even beyond the limit.
    """
    num_choices = units.shape[1]
    slots = units.T.flatten()  # [A·N], first choices first
    asked = wanted.T.flatten()
    rank = torch.zeros_like(slots, dtype=torch.float64)
    if affinity is not None:
        rank = -affinity.T.flatten().double()
    safe = torch.zeros_like(asked) if spared is None else spared.repeat(num_choices)
    order = rank.argsort(stable=True)
    for key in (~safe, ~asked, slots):  # least significant key first: by unit, then asked, spared, rank
        order = order[key[order].argsort(stable=True)]
    sorted_units = slots[order]
    first = torch.searchsorted(sorted_units, sorted_units)
    place = torch.arange(len(order), device=order.device) - first
    late = torch.zeros_like(asked)
    late[order] = place >= room
    return (late & asked & ~safe).unflatten(0, (num_choices, -1)).T
