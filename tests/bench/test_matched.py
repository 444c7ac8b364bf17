"""Contenders compared at equal value of another metric, on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate

from flowbench.bench.claims import parse_claim
from flowbench.bench.matched import average_at_equal
from flowbench.bench.results import Results
from flowbench.bench.verdicts import judge

POINTS = [1.0, 2.0, 3.0, 4.0]
PROBLEMS = {"": ["a", "b"]}


def swept(make_row, curves, axis="guidance"):
    """Rows of ``{contender: by seed [(recall, fd) at each point]}``."""
    for name, by_seed in curves.items():
        for seed, curve in enumerate(by_seed):
            for at, (recall, fd) in zip(POINTS, curve, strict=False):
                place = {"axis": axis, "at": at, "seed": seed, "goal": "down"}
                yield make_row(name, "recall", value=recall, **place)
                yield make_row(name, "fd", value=fd, **place)


def shifted(start, level, seeds=3):
    """fd = 10 recall + level, at recalls that begin somewhere else on each seed."""
    recalls = [[start + 0.1 * i + 0.02 * seed for i in range(4)] for seed in range(seeds)]
    return [[(r, 10 * r + level + 0.001 * seed * seed) for r in curve] for seed, curve in enumerate(recalls)]


def judged(rows, text="a.fd < b.fd at recall"):
    (got,) = judge(parse_claim(text), Results(rows), PROBLEMS)
    return got


def test_curves_are_compared_where_their_recalls_agree(make_row):
    """At equal points of the sweep a is worse, for it has more recall there; at equal recall it is better by 1."""
    rows = list(swept(make_row, {"a": shifted(0.5, 4.0), "b": shifted(0.35, 5.0)}))
    got = judged(rows)
    assert got.verdict == "holds"
    assert got.difference.mean == pytest.approx(-1.0, abs=1e-9)
    assert "mean over recall 0.52 to 0.67" in got.reason
    (at_one_point,) = judge(parse_claim("a.fd@guidance=2 < b.fd@guidance=2"), Results(rows), PROBLEMS)
    assert at_one_point.verdict == "fails"
    assert judged(rows, "a.fd > b.fd at recall").verdict == "fails"
    assert judged(rows, "a.fd < b.fd - 0.9 at recall along guidance").verdict == "holds"
    assert judged(rows, "a.fd ~ b.fd within 1.1 at recall").verdict == "holds"


def test_ranges_that_do_not_overlap_leave_it_undecided(make_row):
    curves = {"a": shifted(0.5, 4.0), "b": shifted(0.35, 5.0)}
    curves["b"][1] = shifted(-3.0, 5.0)[1]
    got = judged(list(swept(make_row, curves)))
    assert got.verdict == "undecided"
    assert "recall of seed 1: the ranges do not overlap: 0.52 to 0.82 against -2.98 to -2.68" in got.reason
    curves["b"] = shifted(-3.0, 5.0)
    assert "share no seed" in judged(list(swept(make_row, curves))).reason


def test_a_point_without_a_number_leaves_it_undecided(make_row):
    rows = list(swept(make_row, {"a": shifted(0.5, 4.0), "b": shifted(0.35, 5.0)}))
    lost = [r for r in rows if (r.contender, r.metric, r.seed, r.at) != ("b", "recall", 2, 3.0)]
    got = judged(lost)
    assert got.verdict == "undecided"
    assert "b has no curve of seed 2: recall at 3 not measured" in got.reason
    assert got.difference.n == 2


def test_what_was_not_swept_is_said(make_row):
    rows = list(swept(make_row, {"a": shifted(0.5, 4.0)}))
    assert "b has no sweep with b.fd and recall" in judged(rows).reason
    rows = list(swept(make_row, {"a": shifted(0.5, 4.0), "b": shifted(0.35, 5.0)}))
    assert "a has no sweep" in judged(rows, "a.fd < b.fd at recall along network_evaluations").reason


def test_the_mean_is_the_integral_over_the_common_range():
    """Against quadrature of two broken lines."""
    a = (np.array([0.0, 1.0, 3.0]), np.array([1.0, 4.0, 2.0]))
    b = (np.array([0.5, 2.0, 2.5]), np.array([0.0, 3.0, 7.0]))
    got = average_at_equal(a, b, "down")
    for mean, (x, y) in ((got.left, a), (got.right, b)):
        integral = scipy.integrate.quad(lambda t, x=x, y=y: np.interp(t, x, y), 0.5, 2.5, points=[1.0, 2.0])[0]
        assert mean == pytest.approx(integral / 2.0, rel=1e-3)
    assert (got.low, got.high) == (0.5, 2.5)


def test_where_a_curve_comes_back_its_better_value_counts():
    """Recall rises and falls again: a user would take the branch with the smaller distance, or the larger accuracy."""
    back = (np.array([0.0, 1.0, 0.0]), np.array([5.0, 5.0, 1.0]))  # the way back has 1 + 4 recall
    flat = (np.array([0.0, 1.0]), np.array([2.0, 2.0]))
    assert average_at_equal(back, flat, "down").left == pytest.approx(3.0)
    assert average_at_equal(back, flat, "up").left == pytest.approx(5.0)
    assert "neither rises nor falls" in average_at_equal(back, flat, "none")
    assert average_at_equal(flat, flat, "none").left == 2.0


def test_a_range_of_one_value_and_equal_neighbours():
    touching = average_at_equal(
        (np.array([0.0, 1.0]), np.array([2.0, 3.0])), (np.array([1.0, 2.0]), np.ones(2)), "down"
    )
    assert (touching.left, touching.right, touching.low, touching.high) == (3.0, 1.0, 1.0, 1.0)
    saturated = (np.array([0.5, 1.0, 1.0]), np.array([4.0, 4.0, 2.0]))
    assert average_at_equal(saturated, (np.array([1.0, 1.0]), np.array([3.0, 5.0])), "down").left == 2.0


def test_trainings_that_share_seeds_decide_no_claim_here_either(make_row):
    rows = list(swept(make_row, {"a": shifted(0.5, 4.0), "b": shifted(0.35, 5.0)}))
    for text in ("a.fd < b.fd at recall", "a.fd ~ b.fd within 1.1 at recall", "a.fd@guidance=2 > b.fd@guidance=2"):
        (got,) = judge(parse_claim(text), Results(rows, crossed=("init", "order")), PROBLEMS)
        assert got.verdict == "undecided", text
        assert "trainings share seeds (init and order are crossed)" in got.reason
        assert judged(rows, text).verdict == "holds", text
