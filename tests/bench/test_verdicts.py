"""Equivalence, ratios, power, the training lottery, and the seeds and rows that decide nothing."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.bench.claims import parse_claim
from flowbench.bench.hypotheses import Equivalence, Order, gap_in_deviations, ratio_interval, seeds_to_settle
from flowbench.bench.results import Results
from flowbench.bench.statistics import summarise
from flowbench.bench.verdicts import judge

PROBLEMS = {"": ["a", "b", "noise"]}
BASE = [2.0, 2.4, 1.9, 2.2, 2.1]


def results(make_row, metric="nll", **contenders):
    return Results(
        make_row(name, metric, value=value, seed=seed, family="reference" if name == "noise" else "F")
        for name, values in contenders.items()
        for seed, value in enumerate(values)
    )


def verdict(rows, text):
    (got,) = judge(parse_claim(text), rows, PROBLEMS)
    return got


def tost(gaps, margin):
    """The larger of two one-sided probabilities, by SciPy's t-test."""
    below = scipy.stats.ttest_1samp(gaps, margin, alternative="less").pvalue
    above = scipy.stats.ttest_1samp(gaps, -margin, alternative="greater").pvalue
    return max(below, above)


@pytest.mark.parametrize(
    ("gaps", "margin", "expected"),
    [
        ([0.01, -0.02, 0.02, 0.0, -0.01], 0.05, "holds"),
        ([0.01, -0.02, 0.02, 0.0, -0.01], 0.01, "undecided"),  # within it, and not shown to be
        ([0.31, 0.28, 0.3, 0.33, 0.29], 0.05, "fails"),
        ([-0.31, -0.28, -0.3, -0.33, -0.29], 0.05, "fails"),
        ([0.31, -0.28, 0.3, 0.33, -0.29], 0.05, "undecided"),  # beyond it, and not shown to be
    ],
)
def test_equivalence_by_two_one_sided_tests(make_row, gaps, margin, expected):
    rows = results(make_row, a=[b + gap for b, gap in zip(BASE, gaps, strict=True)], b=BASE)
    for text in (f"a.nll ~ b.nll within {margin}", f"b.nll ~ a.nll within {margin}"):
        assert verdict(rows, text).verdict == expected
    assert (tost(gaps, margin) < 0.05) == (expected == "holds")
    outside = min(
        scipy.stats.ttest_1samp(gaps, sign * margin, alternative=way).pvalue
        for sign, way in ((1, "greater"), (-1, "less"))
    )
    assert (2 * outside < 0.05) == (expected == "fails")


@pytest.mark.parametrize(("share", "expected"), [(1.02, "holds"), (1.06, "fails"), (1.1, "fails"), (1.05, "undecided")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_share_of_the_right_side_is_one_of_its_mean(make_row, share, expected, sign):
    """Of negative numbers too, such as log-likelihoods."""
    noise = [0.002, -0.001, 0.001, -0.003, 0.001]
    a = [sign * (share * b + e) for b, e in zip(BASE, noise, strict=True)]
    rows = results(make_row, a=a, b=[sign * b for b in BASE])
    got = verdict(rows, "a.nll ~ b.nll within 5%")
    assert got.verdict == expected
    low, high = got.ratio[1:]
    assert (0.95 < low and high < 1.05) == (expected == "holds")  # by Fieller's interval at 90 %


def test_the_reason_of_an_equivalence_shows_its_interval_at_90_percent(make_row):
    gaps = [0.01, -0.02, 0.03]
    rows = results(make_row, a=[b + gap for b, gap in zip(BASE[:3], gaps, strict=True)], b=BASE[:3])
    low, high = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.9)
    assert f"90% interval [{low:.4g}, {high:.4g}]" in verdict(rows, "a.nll ~ b.nll within 0.05").reason


def test_sides_equal_on_every_seed_are_equivalent(make_row):
    assert verdict(results(make_row, a=BASE, b=BASE), "a.nll ~ b.nll within 0.1%").verdict == "holds"
    assert verdict(results(make_row, noise=[2.0]), "noise.nll ~ 2.1 within 10%").verdict == "holds"
    assert verdict(results(make_row, noise=[2.0]), "noise.nll ~ 2.1 within 1%").verdict == "fails"


def test_no_share_of_what_changes_its_sign(make_row):
    rows = results(make_row, a=[0.1, 0.2, 0.3], b=[-0.1, 0.2, 0.3])
    got = verdict(rows, "a.nll ~ b.nll within 5%")
    assert (got.verdict, "changes its sign" in got.reason) == ("undecided", True)


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(-5, 5), st.floats(5, 9)), min_size=3, max_size=9),
    level=st.sampled_from([0.9, 0.95]),
)
def test_fiellers_interval_is_what_the_test_of_the_difference_does_not_reject(pairs, level):
    left, right = (np.array(side) for side in zip(*pairs, strict=True))
    ends = ratio_interval(left, right, level)
    if ends is None or np.ptp(left) < 1e-3:
        return
    for end in ends:
        gaps = left - end * right
        if np.std(gaps) > 1e-6:
            assert scipy.stats.ttest_1samp(gaps, 0).pvalue == pytest.approx(1 - level, rel=1e-4)


def test_a_claim_on_a_ratio_holds_where_fiellers_interval_lies_below_the_factor(make_row):
    rows = results(make_row, "train_seconds", a=[40.0, 44.0, 41.0], b=[100.0, 108.0, 103.0])
    low, high = ratio_interval([40.0, 44.0, 41.0], [100.0, 108.0, 103.0])
    assert low < 125 / 311 < high
    for factor, expected in ((1.01 * high, "holds"), (0.99 * high, "undecided"), (0.99 * low, "fails")):
        got = verdict(rows, f"a.train_seconds < {factor} * b.train_seconds")
        assert got.verdict == expected
        assert f"ratio 0.4019 [{low:.4g}, {high:.4g}]" in got.reason
        assert verdict(rows, f"{factor} * b.train_seconds > a.train_seconds").verdict == expected


@pytest.mark.parametrize(
    ("b", "words"),
    [([-2.0, -2.1, -1.9], "negative, so the difference is judged"), ([-2.0, 3.0, 0.5], "may be 0, so the ratio")],
)
def test_a_ratio_to_what_is_not_positive_is_said_to_be_none(make_row, b, words):
    rows = results(make_row, a=[1.0, 1.1, 1.2], b=b)
    assert words in verdict(rows, "a.nll > 5 * b.nll").reason


@pytest.mark.parametrize("metric", ["train_seconds", "nll"])
@pytest.mark.parametrize("text", ["a.{0} < b.{0}", "a.{0} < 2", "b.{0} > 1.5", "a.{0} ~ b.{0} within 5%", "a.{0} > 3"])
def test_one_seed_gives_no_verdict(make_row, metric, text):
    for b in (2.0, 1.0):
        got = verdict(results(make_row, metric, a=[1.0], b=[b]), text.format(metric))
        assert (got.verdict, got.outcome) == ("undecided", None)
        assert "one seed" in got.reason


def test_rows_that_were_measured_and_do_not_count_decide_nothing(make_row):
    """A number whose row has any status but ok is a gap, at the points of a sweep too."""
    values = [(name, seed, level + 0.1 * seed) for name, level in (("a", 1.0), ("b", 5.0)) for seed in range(3)]
    rows = []
    for name, seed, value in values:
        lost = {"status": "skipped", "provenance": {"message": "unsure"}} if (name, seed) == ("b", 1) else {}
        rows.append(make_row(name, value=value, seed=seed, **lost))
        rows.append(make_row(name, "fd", value=value, seed=seed, axis="guidance", at=1.0, **lost))
    for text, side in (("a.nll < b.nll", "b.nll"), ("a.fd@guidance=1 < b.fd@guidance=1", "b.fd@guidance=1")):
        got = verdict(Results(rows), text)
        assert got.verdict == "undecided"
        assert f"{side} has no number of seed 1: unsure" in got.reason
    assert Results(rows).values("", "b", "nll").keys() == {0, 2}
    assert Results(rows).doubtful("", "b", "nll") == {1: (5.1, "unsure")}  # it stands in tables, in grey


# Power


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_gap_that_seeds_can_show_is_shown_in_80_percent_of_cases(n):
    """By simulation: SciPy's t-test finds it in 80 of 100 cases."""
    rng = np.random.default_rng(n)
    draws = rng.normal(gap_in_deviations(n), 1.0, (20_000, n))
    shown = scipy.stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.012)


def test_the_margin_that_seeds_can_show_is_shown_in_80_percent_of_cases():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.0, 1.0, 5)
    gaps = (gaps - gaps.mean()) / gaps.std(ddof=1)
    margin = Equivalence(summarise(list(gaps - 9)), summarise(list(gaps + 9))).detectable()
    draws = rng.normal(0.0, 1.0, (20_000, 5))
    below = scipy.stats.ttest_1samp(draws, margin, axis=1, alternative="less").pvalue
    above = scipy.stats.ttest_1samp(draws, -margin, axis=1, alternative="greater").pvalue
    assert (np.maximum(below, above) < 0.05).mean() == pytest.approx(0.8, abs=0.015)


def test_so_many_seeds_settle_a_claim_and_one_less_does_not():
    between = summarise([1.0, -0.2, 0.4])
    needed = seeds_to_settle(Order(between, "<").outcome, 3)
    for n, settled in ((needed - 1, False), (needed, True)):
        half = scipy.stats.t.ppf(0.975, n - 1) * between.sd / math.sqrt(n)
        assert (abs(between.mean) > half) == settled
    assert seeds_to_settle(Order(summarise([1.0, -1.0]), "<").outcome, 2) is None


def test_an_undecided_claim_tells_what_its_seeds_can_show(make_row):
    rows = results(make_row, a=[1.0, 2.0, 3.0], b=[1.6, 1.8, 3.4])
    got = verdict(rows, "a.nll < b.nll")
    gap = gap_in_deviations(3) * np.std([-0.6, 0.2, -0.4], ddof=1)
    assert f"3 seeds can show a gap of {gap:.2g}" in got.reason
    assert f"{got.seeds_needed} seeds would settle it if difference and spread stayed" in got.reason
    assert got.detectable == pytest.approx(gap)
    same = verdict(results(make_row, a=[1.0, 2.0], b=[2.0, 1.0]), "a.nll < b.nll")
    assert "more than 1,000 seeds" in same.reason
    close = verdict(rows, "a.nll ~ b.nll within 0.3")
    assert re.search(r"3 seeds can show equality within \d", close.reason)
    assert "can show" not in verdict(results(make_row, a=[1.0, 2.0], b=[3.0, 4.01]), "a.nll < b.nll").reason


# The training lottery


@pytest.mark.parametrize(("gap", "inside"), [(0.012, True), (0.014, False), (-0.012, True)])
def test_a_small_gap_of_an_fid_is_inside_the_training_lottery(make_row, gap, inside):
    a = [20.0 * (1 + gap) + 0.001 * seed * seed for seed in range(3)]
    got = verdict(results(make_row, "fid", a=a, b=[20.0, 20.0, 20.0]), "a.fid < b.fid")
    assert got.verdict == ("holds" if gap < 0 else "fails")  # marked, and judged all the same
    assert (got.is_inside_lottery, "inside the training lottery (1.3%" in got.reason) == (inside, inside)
    other = verdict(results(make_row, "nll", a=a, b=[20.0, 20.0, 20.0]), "a.nll < b.nll")
    assert not other.is_inside_lottery
