from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.bench.statistics import Summary, best_and_ties, paired_difference, summarise

numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@settings(max_examples=20, deadline=None)
@given(values=numbers)
def test_interval_agrees_with_scipy(values):
    got = summarise(values)
    assert got.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert got.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    if got.sd > 1e-9:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
        assert (got.mean - got.half, got.mean + got.half) == pytest.approx((low, high), abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=3, max_size=10))
def test_paired_difference_agrees_with_scipy(pairs):
    left, right = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    got = paired_difference(left, right)
    if got.sd > 1e-6:
        expected = scipy.stats.ttest_rel(list(left.values()), list(right.values())).confidence_interval(0.95)
        assert (got.mean - got.half, got.mean + got.half) == pytest.approx(tuple(expected), abs=1e-8)
        assert got.is_tie == (expected.low <= 0 <= expected.high)


def test_only_shared_seeds_are_paired():
    assert paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 3.0, 7: 0.0}).n == 2
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_equal_values_have_no_interval_not_even_of_rounding():
    summary = summarise([0.1] * 5)  # whose sum is not five times 0.1
    assert (summary.mean, summary.sd, summary.half) == (0.1, 0.0, 0.0)


def test_one_seed_has_no_interval():
    assert summarise([3.0]) == Summary(1, 3.0, None, None)
    assert summarise([3.0]).is_tie is None
    with pytest.raises(ValueError, match="no values"):
        summarise([])


@pytest.mark.parametrize(
    ("goal", "expected"),
    [("down", {"a", "b"}), ("up", {"c"}), ("zero", {"a", "b"}), ("none", set())],
)
def test_best_and_ties(goal, expected):
    values = {
        "a": {0: 1.0, 1: 1.1, 2: 0.9},
        "b": {0: 1.2, 1: 0.8, 2: 1.1},  # not told from a with three seeds
        "c": {0: 3.0, 1: 3.1, 2: 2.9},
        "d": {},
    }
    assert best_and_ties(values, goal) == expected


def test_zero_goal_takes_the_smaller_magnitude():
    assert best_and_ties({"a": {0: -0.1}, "b": {0: 0.3}, "c": {0: -5.0}}, "zero") == {"a"}


def test_a_single_contender_wins_nothing():
    assert best_and_ties({"a": {0: 1.0, 1: 2.0}, "b": {}}, "down") == set()
