"""The processes that train one model together, as a value: rank, size, and sums over all of them.

A world of one is a world: its sums are the identity, and nothing else in the package asks how many there are. Sums run
through `torch.distributed`, whose process group is made by `join` from the variables that torchrun sets.
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
    """`rank` of `size` processes; more than one share the default process group."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This process's part of what is dealt out in turns, rows of a batch for one."""
        return slice(self.rank, None, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that all processes hold, in all of them."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def sum_numbers(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Sums of whole numbers."""
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
        """The main process's number, in all of them."""
        if self.size == 1:
            return number
        value = torch.tensor([number], dtype=torch.int64)
        dist.broadcast(value, 0)
        return int(value)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ONE = World()


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun describes (RANK, WORLD_SIZE, …), or a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ONE
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
