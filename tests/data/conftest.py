"""Shards written by hand, so that tests of packing do not rest on the code that writes them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moestro.data.shards import ShardSet, open_shards

Lengths = dict[str, list[int]]


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[[Lengths], ShardSet]:
    """Makes shards from document lengths by domain (the same in both splits); no token id comes twice."""

    def make(lengths: Lengths) -> ShardSet:
        folder = tmp_path / f"shards-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        entries, first = [], 10
        for number, (name, sizes) in enumerate(lengths.items()):
            total = sum(sizes)
            counts = {"tokens": total, "documents": len(sizes), "bytes": 0}
            for split in ("train", "valid"):
                np.arange(first, first + total, dtype="<u4").tofile(folder / f"{number}.{split}.tokens")
                np.cumsum([0, *sizes]).astype("<u8").tofile(folder / f"{number}.{split}.offsets")
            entries.append({"name": name, "train": counts, "valid": counts})
            first += total
        index = {"format": 1, "dtype": "uint32", "vocab_size": 1 << 20, "tokenizer": "t", "source": "s"}
        (folder / "index.json").write_text(json.dumps(index | {"domains": entries}))
        return open_shards(folder)

    return make
