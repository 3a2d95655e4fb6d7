"""The size dial: every depth gives a configuration that is valid and grows."""

import pytest

from moestro.config import build_config
from moestro.errors import ConfigError
from moestro.model.size import measure_size
from moestro.sizes import MAX_DEPTH, MIN_DEPTH, format_bytes, parse_bytes, tree_of_depth


def test_every_depth_is_valid_and_larger_than_the_one_before() -> None:
    sizes = []
    for depth in range(MIN_DEPTH, MAX_DEPTH + 1):
        config = build_config(tree_of_depth(depth))
        assert config.model.num_layers == depth
        assert config.train.steps >= 200
        sizes.append(measure_size(config.model).total)
    assert sizes == sorted(sizes)
    assert sizes[-1] > 100 * sizes[0]


@pytest.mark.parametrize("depth", [MIN_DEPTH - 1, MAX_DEPTH + 1, -3])
def test_a_depth_out_of_range_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match="depth must lie between"):
        tree_of_depth(depth)


def test_bytes_are_read_in_the_usual_spellings() -> None:
    sizes = {"4GiB": 4 * 2**30, "512 MiB": 2**29, "1.5G": 3 * 2**29, "1000": 1000, "7B": 7, "2K": 2048}
    sizes |= {"4g": 4 * 2**30, "4gib": 4 * 2**30, "4 GiB": 4 * 2**30, "4GB": 4 * 10**9, "4 gb": 4 * 10**9}
    sizes |= {"512MB": 512 * 10**6, "1.5 kb": 1500, "1T": 2**40}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "-1", "0", "0.1", "4 GiB GiB", "4,5GiB", "4iB", "4Gbit", "4E", "nan", "1e9"):
        with pytest.raises(ConfigError, match="4GiB"):
            parse_bytes(text)


def test_bytes_are_written_in_thousands() -> None:
    sizes = {0: "0.00 kB", 999: "1.00 kB", 12_345_678: "12.35 MB", 9.6e9: "9.60 GB", 1.37e12: "1.37 TB"}
    assert {size: format_bytes(size) for size in sizes} == sizes
