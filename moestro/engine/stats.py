"""What an engine has done so far, in numbers, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_WAITING = 64  # steps


@dataclass(frozen=True)
class EngineStats:
    """An engine's current state, and its totals since it started.

    `prompt_tokens` are those of sequences whose prompt is computed, `prefix_hit_tokens` were found in the cache when
    sequences began. `drafted[i]` and `accepted[i]` count the steps in which a sequence's i-th draft was checked, and
    found right. `speculation_off`: sequences that stopped drafting because it did not pay. `loads` int64
    [MoE layers, experts]: the choices of all computed tokens, including drafts and recomputed tokens.
    """

    running: int
    waiting: int
    pages_used: int
    pages: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    prefix_hit_tokens: int
    drafted: list[int]
    accepted: list[int]
    speculation_off: int
    loads: Tensor


@dataclass(frozen=True)
class DraftCounts:
    """One continuation's drafts by place, and how many tokens it had when it gave up drafting, if it did."""

    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    off_after: int | None


@dataclass
class Counters:
    """What the engine itself counts. `loads` is complete after `settle`, which counts many steps as fast as one."""

    loads: Tensor
    drafted: list[int]
    accepted: list[int]
    prompt_tokens: int = 0
    generated_tokens: int = 0
    speculation_off: int = 0
    _offsets: Tensor = field(init=False)
    _waiting: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        layers, experts = self.loads.shape
        self._offsets = torch.arange(layers)[:, None] * experts

    def add_routes(self, ids: Tensor) -> None:
        """Expert ids [N, L, A]."""
        self._waiting.append(ids)
        if len(self._waiting) == MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        """Count all waiting steps, with one count for all layers."""
        if self._waiting:
            ids = torch.cat(self._waiting) + self._offsets
            self.loads += torch.bincount(ids.flatten(), minlength=self.loads.numel()).view_as(self.loads)
            self._waiting.clear()

    def add_drafts(self, drafted: int, accepted: int) -> None:
        """Note one check of `drafted` drafts, of which the first `accepted` were right."""
        for place in range(drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < accepted
