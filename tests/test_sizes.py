"""The size dial: every depth gives a configuration that is valid and grows."""

import pytest

from moestro.config import build_config
from moestro.errors import ConfigError
from moestro.model.size import measure_size
from moestro.sizes import MAX_DEPTH, MIN_DEPTH, tree_of_depth


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
