"""Intervals compared with closed forms, and how often they contain the truth."""

import math

import numpy as np
import pytest

from dms_jax.evaluation.statistics import bootstrap_mean, fraction_above, percentiles, wilson

Z = 1.959963984540054


@pytest.mark.parametrize("hits, trials", [(0, 1), (0, 20), (20, 20), (7, 20), (0.5, 3), (399, 400)])
def test_wilson_ends_are_where_the_score_test_just_rejects(hits, trials):
    """The interval is {p: (observed - p)^2 <= z^2 p (1 - p) / n}, so its ends solve this with equality."""
    got = wilson(hits, trials)
    for end in (got.low, got.high):
        assert (hits / trials - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / trials, abs=1e-12)
    assert 0 <= got.low <= got.value <= got.high <= 1 and got.units == trials


def test_wilson_equals_known_numbers():
    assert wilson(0, 10) == (0, 0, pytest.approx(Z**2 / (10 + Z**2)), 10)
    assert wilson(10, 10) == (1, pytest.approx(10 / (10 + Z**2)), 1, 10)
    half = Z / 2 / math.sqrt(100 + Z**2)  # p = 1/2 is symmetric
    assert wilson(50, 100)[:3] == (0.5, pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert wilson(50, 100, level=0.99).low < wilson(50, 100).low


@pytest.mark.parametrize("hits, trials", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_an_impossible_accuracy(hits, trials):
    with pytest.raises(ValueError, match="hits"):
        wilson(hits, trials)


def test_percentiles_equal_the_closed_form():
    assert percentiles(np.arange(101.0)) == (50, 95, 99)
    assert percentiles(np.array([3.0, 1.0]), (0, 25, 100)) == (1, 1.5, 3)
    assert percentiles(np.array([[7.0]]), (5, 99)) == (7, 7)


def test_fraction_above_counts_strictly_larger_values():
    values = np.array([[0.0, 1.0], [1.0, 4.0]])
    np.testing.assert_allclose(
        fraction_above(values, np.array([-1, 0, 0.5, 1, 3.9, 4])), [1, 0.75, 0.75, 0.25, 0.25, 0]
    )


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """Means of 25 exponential units, skewed like KL, whose true mean is 1: percentile intervals cover it in 92 to
    93%."""
    rng = np.random.default_rng(0)
    hit = [
        low <= 1 <= high
        for _, low, high, _ in (bootstrap_mean(rng.exponential(size=25), draws=800, seed=i) for i in range(400))
    ]
    assert 0.88 < np.mean(hit) < 0.97


def test_bootstrap_width_is_that_of_the_normal_approximation():
    x = np.random.default_rng(1).normal(size=400)
    got = bootstrap_mean(x)
    assert got.value == pytest.approx(x.mean()) and got.units == 400
    assert got.high - got.low == pytest.approx(2 * Z * x.std() / 20, rel=0.05)
    assert bootstrap_mean(x) == got  # seeded
    assert bootstrap_mean(x, seed=1) != got


def test_bootstrap_of_degenerate_units_has_no_interval():
    alone = bootstrap_mean([0.3])
    assert alone.value == 0.3 and math.isnan(alone.low) and math.isnan(alone.high)
    assert bootstrap_mean([0.1, 0.1, 0.1])[1:3] == (bootstrap_mean([0.1, 0.1, 0.1]).value,) * 2
    assert math.isnan(bootstrap_mean([1.0, math.nan]).low)
    for values, weights in (([], None), ([1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [2.0, -1.0])):
        with pytest.raises(ValueError, match="at least one unit"):
            bootstrap_mean(values, weights)


def test_weights_repeat_units_in_the_mean_but_not_in_the_draw():
    assert bootstrap_mean([0.0, 1.0], [1, 3]).value == 0.75
    x = np.array([0.0, 1.0, 5.0, 2.0])
    assert bootstrap_mean(x, [7] * 4) == pytest.approx(bootstrap_mean(x))  # equal weights change nothing
