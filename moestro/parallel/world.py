"""The processes that train one model together: rank, size, and sums over all of them.

A single process is a world too: its sums are the identity, and nothing else in the package asks how many processes
there are. Sums go through `torch.distributed`; `join` makes its process group from the variables that torchrun sets.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; more than one share the default process group."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes for all."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This process's part of anything dealt out round-robin, such as the rows of a batch."""
        return slice(self.rank, None, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all processes; every process gets it."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def sum_numbers(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """The sum of each whole number over all processes."""
        return tuple(self.sum(torch.tensor([*numbers], dtype=torch.int64)).tolist())

    def sum_gradients(self, model: nn.Module) -> None:
        """Make every gradient the sum over all processes, in place; a parameter without one counts as 0."""
        if self.size == 1:
            return
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def agree(self, number: int) -> int:
        """The main process's number, in every process."""
        if self.size == 1:
            return number
        value = torch.tensor([number], dtype=torch.int64)
        dist.broadcast(value, 0)
        return int(value)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


ONE = World()


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun describes (RANK, WORLD_SIZE, …), or a single process without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ONE
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
