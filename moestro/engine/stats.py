"""What an engine has done so far, in numbers, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_WAITING = 64  # steps


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine; what is not of the moment counts since its start.

    `prompt_tokens` of the sequences whose prompt is computed, `prefix_hit_tokens` found in the cache when sequences
    began. `drafted[i]` and `accepted[i]`: steps in which some sequence's i-th draft was checked, and found right.
    `speculation_off`: sequences that stopped drafting because it did not pay. `loads` int64 [MoE layers, experts]:
    choices of all computed tokens, of drafts and recomputed ones too.
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
    """Drafts of one continuation by their place, and how many tokens it had when drafting was given up, if it was."""

    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    off_after: int | None


@dataclass
class Counters:
    """What the engine itself counts. `loads` is complete after `settle`: many steps are counted as fast as one."""

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
        """Count what waits: one count for all layers."""
        if self._waiting:
            ids = torch.cat(self._waiting) + self._offsets
            self.loads += torch.bincount(ids.flatten(), minlength=self.loads.numel()).view_as(self.loads)
            self._waiting.clear()

    def add_drafts(self, drafted: int, accepted: int) -> None:
        """One check of so many drafts, the first of which were right."""
        for place in range(drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < accepted
