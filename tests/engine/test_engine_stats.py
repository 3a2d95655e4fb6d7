"""The counters of an engine, against counting by hand."""

from __future__ import annotations

import torch

from moestro.engine.stats import Counters


def test_loads_are_counted_layer_by_layer() -> None:
    counters = Counters(torch.zeros(3, 7, dtype=torch.int64), [], [])
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 7, (count, 3, 2), generator=generator) for count in (1, 5, 40)]
    for ids in batches:
        counters.add_routes(ids)
    counters.settle()
    every = torch.cat(batches)
    for layer in range(3):
        for expert in range(7):
            assert int(counters.loads[layer, expert]) == int((every[:, layer] == expert).sum())


def test_drafts_are_counted_place_by_place() -> None:
    counters = Counters(torch.zeros(1, 2, dtype=torch.int64), [0] * 3, [0] * 3)
    for drafted, accepted in ((3, 3), (3, 1), (2, 0), (1, 1)):
        counters.add_drafts(drafted, accepted)
    assert (counters.drafted, counters.accepted) == ([4, 3, 2], [3, 1, 1])
