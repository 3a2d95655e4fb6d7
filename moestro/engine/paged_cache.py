"""The cache of many sequences: tensors [P, 64, W] by layer and name, and the routes of the tokens in the same pages.

Each layer says what it caches (`CacheSpec` in model/attention.py): names, each with a width and a type. With `cache`
"fp8" latents are codes with scales (`ops/serving/fp8_rows.py`); "auto" is the type of the activations.

Rows are written to slots, page · 64 + place in the page; attention reads a sequence through its list of pages. MTP
modules have their own layers, after the main ones. Routes are always kept (2 bytes a choice, a few thousandths of a
row in V3), so that a prefix that another request computed has them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro import machine
from moestro.config import ModelConfig
from moestro.engine.pages import PAGE_SIZE
from moestro.engine.scheduler import pages_for
from moestro.errors import ConfigError
from moestro.model.attention import CacheSpec, list_caches
from moestro.model.rope import rope_tables
from moestro.ops.serving.program import StepLayout
from moestro.sizes import format_bytes

FREE_SHARE = 0.5  # share of the free memory to use if the user names no size
LEAST_SHARE = 0.125  # share of the free memory that counts as free even beside mapped weights larger than memory
LEAST_PAGES = 4  # for a sequence: a context of fewer tokens is of no use


@dataclass(frozen=True, slots=True)
class StepInput(StepLayout):
    """The N tokens [N] of a step; sequence s has tokens starts[s]:starts[s+1], at positions from first[s] on."""

    tokens: Tensor


def count_moe_layers(config: ModelConfig) -> int:
    """How many main blocks have a router."""
    return len(config.moe_layers)


def page_bytes(config: ModelConfig, dtype: torch.dtype, cache: str = "auto") -> int:
    """Bytes of one page over all layers, including its routes."""
    rows = sum(spec.count_bytes(dtype) for specs in list_caches(config, cache) for spec in specs)
    return PAGE_SIZE * (rows + count_moe_layers(config) * config.top_k * torch.int16.itemsize)


@dataclass(frozen=True)
class Room:
    """What a cache may hold: `num_pages` pages, and sequences of up to `context` tokens."""

    num_pages: int
    context: int


def plan_room(
    config: ModelConfig,
    dtype: torch.dtype,
    max_sequences: int,
    num_bytes: int,
    cache: str = "auto",
    max_context: int | None = None,
) -> Room:
    """The pages that fit `num_bytes`; at most what `max_sequences` of `max_context` tokens could use.

    Without `max_context` sequences may be as long as the model's own maximum, or as fits. ConfigError if `max_context`
    exceeds that maximum or does not fit, or if hardly anything fits.
    """
    check_context(config, max_context)
    longest = config.max_seq_len
    size, wanted = page_bytes(config, dtype, cache), pages_for(max_context or longest)
    count = min(num_bytes // size, wanted * max_sequences)
    least = wanted if max_context else min(wanted, LEAST_PAGES)
    if count < least:
        tokens = max_context or min(least * PAGE_SIZE, longest)
        raise ConfigError(
            f"the cache needs {format_bytes(least * size)} for one sequence of {tokens:,} tokens, "
            f"and has {format_bytes(num_bytes)}",
            hint="lower --max-context, or free memory",
        )
    return Room(count, min(max_context or longest, count * PAGE_SIZE))


def check_context(config: ModelConfig, max_context: int | None) -> None:
    """Raise ConfigError for a context that the model cannot have."""
    if max_context is not None and not 1 <= max_context <= config.max_seq_len:
        raise ConfigError(f"max_context must lie between 1 and the model's own {config.max_seq_len}, not {max_context}")


def free_bytes(mapped: int = 0) -> int:
    """Bytes that a cache may take where nobody names a size: half of the free memory.

    `mapped`: bytes of weights in mapped files. The system counts them as free, yet they should stay in memory.
    """
    available = machine.memory_bytes()[1]
    return int(max(available - mapped, available * LEAST_SHARE) * FREE_SHARE)


def make_caches(specs: Sequence[CacheSpec], num_pages: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Unwritten pages for a layer's caches, by name; `dtype` is the model's."""
    return {spec.name: torch.empty(num_pages, PAGE_SIZE, spec.width, dtype=spec.dtype or dtype) for spec in specs}


class PagedCache:
    """The tensors. `angles` are computed once, so that a position has the same angle in every batch.

    Sequences have at most `context` tokens, by default the model's own maximum.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        dtype: torch.dtype,
        cache: str = "auto",
        *,
        context: int | None = None,
    ) -> None:
        shape = (num_pages, PAGE_SIZE)
        self.layers = [make_caches(specs, num_pages, dtype) for specs in list_caches(config, cache)]
        self.routes = torch.empty(*shape, count_moe_layers(config), config.top_k, dtype=torch.int16)
        self._routes_by_slot = self.routes.flatten(0, 1)
        self.angles = torch.stack(rope_tables(config, torch.arange(context or config.max_seq_len)))  # cos and sin

    def grow(self, num_pages: int) -> None:
        """Have this many pages from now on; those that are there keep their rows. One tensor at a time is copied."""
        for caches in self.layers:
            for name, pages in caches.items():
                caches[name] = _longer(pages, num_pages)
        self.routes = _longer(self.routes, num_pages)
        self._routes_by_slot = self.routes.flatten(0, 1)

    def prepare(self, parts: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> StepInput:
        """The step that computes the given (tokens, position of the first, pages for all positions) per sequence."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for ids, first, pages in parts:
            span = range(first, first + len(ids))
            tokens += ids
            positions += span
            slots += [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in span]
            starts.append(len(tokens))
        most = max(len(pages) for _, _, pages in parts)
        tables = torch.tensor([[*pages, *[0] * (most - len(pages))] for _, _, pages in parts], dtype=torch.int32)
        numbers = torch.tensor([*slots, *starts, *(first for _, first, _ in parts), *positions, *tokens])
        n, s = len(tokens), len(parts)
        to, begins, firsts, at, own = torch.split_with_sizes(numbers, (n, s + 1, s, n, n))
        cos, sin = self.angles.index_select(1, at).unbind()
        return StepInput(to, tables, begins, firsts, cos, sin, own)

    def write_routes(self, slots: Tensor, ids: Tensor) -> None:
        """Keep the expert ids [N, L, A] int16 of the tokens in these slots."""
        self._routes_by_slot.index_copy_(0, slots, ids)

    def read_routes(self, pages: Sequence[int], count: int) -> Tensor:
        """Expert ids [count, L, A] int16 of the first `count` tokens of a sequence."""
        return self.routes[list(pages)].flatten(0, 1)[:count]


def _longer(pages: Tensor, length: int) -> Tensor:
    out = pages.new_empty(length, *pages.shape[1:])
    out[: len(pages)] = pages
    return out
