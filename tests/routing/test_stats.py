"""Balance figures against slow transcriptions of their formulas."""

import math

import numpy as np
import pytest

from moestro.routing import stats


def random_loads(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.poisson(rng.gamma(0.5, 20, shape)).astype(np.uint32)


def test_ratios_equal_the_transcribed_formulas() -> None:
    loads = random_loads(3, 4, 8)
    for index in np.ndindex(3, 4):
        row = [int(load) for load in loads[index]]
        mean = sum(row) / len(row)
        assert stats.max_vio(loads)[index] == pytest.approx((max(row) - mean) / mean)
        assert stats.max_over_mean(loads)[index] == pytest.approx(max(row) / mean)
        assert stats.dead_experts(loads)[index] == row.count(0)
        shares = [load / sum(row) for load in row if load]
        entropy = sum(p * math.log(1 / p) for p in shares) / math.log(len(row))
        assert stats.load_entropy(loads)[index] == pytest.approx(entropy)


def test_extremes() -> None:
    uniform, single = np.full(16, 9), np.eye(16)[3] * 40
    assert stats.max_vio(uniform) == 0
    assert stats.load_entropy(uniform) == pytest.approx(1)
    assert stats.dead_experts(uniform) == 0
    assert stats.max_vio(single) == 15
    assert stats.max_over_mean(single) == 16
    assert stats.load_entropy(single) == 0
    assert stats.dead_experts(single) == 15
    assert stats.load_entropy(np.array([[5], [9]])).tolist() == [1, 1]


@pytest.mark.filterwarnings("error")
def test_a_layer_without_tokens_is_nan_and_wholly_dead() -> None:
    loads = np.array([[0, 0, 0], [1, 1, 4]], np.uint32)
    assert np.isnan(stats.max_vio(loads)).tolist() == [True, False]
    assert np.isnan(stats.max_over_mean(loads)).tolist() == [True, False]
    assert np.isnan(stats.load_entropy(loads)).tolist() == [True, False]
    assert stats.dead_experts(loads).tolist() == [3, 0]
    assert np.isnan(stats.load_entropy(np.array([0])))


def test_unsigned_loads_do_not_wrap() -> None:
    assert stats.max_vio(np.array([2**32 - 1, 0], np.uint32)) == pytest.approx(1)


def test_specialisation_equals_the_transcribed_formula() -> None:
    loads = random_loads(3, 2, 5)
    loads[:, 0, 1] = 0  # dead expert
    loads[2, 1] = 0  # domain without tokens in a layer
    result = stats.specialisation(loads, smoothing=2.0)
    prior = 2.0 * 5
    for d, layer, expert in np.ndindex(*loads.shape):
        shares = [int(row[expert]) / int(row.sum()) for row in loads[:, layer] if row.sum()]
        mean = sum(shares) / len(shares)
        n, total = int(loads[d, layer, expert]), int(loads[d, layer].sum())
        expected = math.log2((n + prior * mean) / (total + prior) / mean) if mean else 0.0
        assert result[d, layer, expert] == pytest.approx(expected, abs=1e-12)


def test_specialisation_is_zero_without_evidence_and_bounded() -> None:
    loads = np.zeros((4, 1, 8))
    assert not stats.specialisation(loads).any()
    loads[:, 0] = 100
    np.testing.assert_allclose(stats.specialisation(loads), 0, atol=1e-12)
    exclusive = np.zeros((2, 1, 2))
    exclusive[0, 0, 0] = exclusive[1, 0, 1] = 1e9
    result = stats.specialisation(exclusive)
    assert result.max() <= 1
    assert result[0, 0, 0] == pytest.approx(1, abs=1e-6)
    assert result[0, 0, 1] < -20


def test_specialisation_does_not_depend_on_domain_size() -> None:
    loads = (random_loads(2, 3, 6).astype(np.float64) + 1) * 1e6
    scaled = loads * np.array([1, 50])[:, None, None]
    np.testing.assert_allclose(stats.specialisation(scaled), stats.specialisation(loads), atol=1e-4)


@pytest.mark.parametrize("bad", [np.float64(3), np.zeros((2, 0))])
def test_shapes_without_experts_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least one expert"):
        stats.max_vio(bad)


def test_specialisation_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[D, L, E\]"):
        stats.specialisation(np.ones((2, 3)))
    with pytest.raises(ValueError, match="smoothing"):
        stats.specialisation(np.ones((1, 1, 2)), smoothing=0)
