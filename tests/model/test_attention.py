"""Which tokens belong together, and what a cache has to hold. The arithmetic is tested in tests/parity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moestro.config import Config
from moestro.model.attention import AttentionBatch, cache_width

Make = Callable[..., Config]


def test_packed_positions_start_again_with_each_document_and_row() -> None:
    batch = AttentionBatch.packed(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 0, 0, 1, 2]
    assert batch.starts.tolist() == [0, 2, 5, 6, 7, 10]


@pytest.mark.parametrize(
    ("overrides", "width"),
    [
        (["mla"], 16 + 4),
        (["mha"], 4 * (12 + 8)),
        (["gqa", "model.num_kv_heads=2"], 2 * (12 + 8)),
        (["mqa"], 12 + 8),
    ],
)
def test_cache_width_is_what_the_papers_count(make_config: Make, overrides: list[str], width: int) -> None:
    kind, *rest = overrides
    assert cache_width(make_config(f"model.attention={kind}", "model.num_heads=4", *rest).model) == width
