"""Estimates and their intervals against closed forms."""

import numpy as np
import pytest

from bilevel_fast.metrics import interval

rng = np.random.default_rng(5)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = rng.normal(30, 4, 400)
    found = interval.mean(values, draws=4000)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.04)
    assert found.high == pytest.approx(values.mean() + half, abs=0.04)
    assert found.n == 400


def test_groups_count_alike_however_large_and_are_resampled_apart():
    values = np.concatenate([np.full(90, 10.0), rng.normal(20, 1, 10)])
    groups = ["a"] * 90 + ["b"] * 10
    found = interval.mean(values, groups, draws=4000)
    assert found.value == pytest.approx((10 + values[90:].mean()) / 2)
    half = 1.96 * values[90:].std() / np.sqrt(10) / 2  # group a does not vary, and no draw moves images between groups
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_the_seed_decides():
    values = rng.normal(0, 1, 50)
    assert interval.mean(values, seed=3) == interval.mean(values, seed=3)
    assert interval.mean(values, seed=3) != interval.mean(values, seed=4)


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0, 4.1825), (100.0, 95.8175, 100)])
def test_equal_outcomes_leave_something_open(value, low, high):
    """88 of 88: Wilson's interval, z^2 / (n + z^2) wide."""
    found = interval.mean(np.full(88, value), share=True)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    assert "Wilson" in found.interval


def test_a_share_that_varies_is_bootstrapped():
    found = interval.mean(np.repeat([0.0, 100.0], [12, 76]), share=True, draws=4000)
    assert found.value == pytest.approx(100 * 76 / 88)
    half = 196 * np.sqrt(12 * 76) / 88 / np.sqrt(88)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_pairs_stay_pairs():
    """A ratio of proportional counts does not vary at all if pairs are drawn together."""
    theirs = rng.integers(1, 9, 60)
    found = interval.ratio_of_sums(2 * theirs, theirs, lambda r: 100 * (1 - r), draws=500, seed=0)
    assert (found.value, found.low, found.high) == (-100, -100, -100)
    other = interval.ratio_of_sums(rng.permutation(2 * theirs), theirs, lambda r: 100 * (1 - r), draws=500, seed=0)
    assert other.value == -100
    assert other.low < -105
    assert other.high > -95


def test_a_ratio_that_mostly_divides_by_nothing_has_no_interval():
    one = np.array([1] + [0] * 19)
    found = interval.ratio_of_sums(one, one, lambda r: r, draws=1000, seed=0)
    assert (found.value, found.low, found.high) == (1, None, None)
    assert "nothing to divide by" in found.interval


def test_one_image_has_no_interval():
    found = interval.mean(np.array([7.0]))
    assert (found.value, found.low, found.n) == (7, None, 1)
