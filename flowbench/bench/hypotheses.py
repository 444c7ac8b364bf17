"""Tests of a claim on differences paired by seed, and how many seeds they need.

An order is tested two-sided by Student's t, so that a claim may hold or fail. Equivalence is tested by two one-sided
tests (Schuirmann 1987): it holds where the difference is shown to lie above the lower margin and below the upper one. A
ratio needs no test of its own: ``a < 0.5 b`` is tested on ``a - 0.5 b``, and the ratios that this test does not reject
are Fieller's interval (1954).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

from flowbench.bench.statistics import Summary

__all__ = [
    "ALPHA",
    "MOST_SEEDS",
    "POWER",
    "Equivalence",
    "Order",
    "Outcome",
    "gap_in_deviations",
    "ratio_interval",
    "seeds_to_settle",
]

ALPHA = 0.05
"""Rate of false verdicts that a test allows."""

POWER = 0.8
"""Share of the cases in which a gap that can be shown is shown."""

MOST_SEEDS = 1000
"""Seeds beyond which no number is given."""


@dataclass(frozen=True)
class Outcome:
    """What the seeds point to, and the probability of pointing there as clearly where it is false.

    Example:
        >>> Outcome("holds", 0.01).is_decided, Outcome("fails", 0.2).is_decided
        (True, False)
    """

    towards: Literal["holds", "fails"]
    p: float

    @property
    def is_decided(self) -> bool:
        """Whether the probability is below 5 %."""
        return self.p < ALPHA


@dataclass(frozen=True)
class Order:
    """Whether a mean difference left - right lies below 0 (``<``) or above it (``>``), by two seeds or more.

    Example:
        >>> from flowbench.bench.statistics import summarise
        >>> Order(summarise([-1.0, -1.1, -0.9]), "<").outcome().towards
        'holds'
    """

    between: Summary
    operator: Literal["<", ">"]

    def outcome(self, n: int | None = None) -> Outcome:
        """The result, or what it would be with ``n`` seeds of the same mean and spread."""
        below, above = _one_sided(self.between, n)
        is_claimed = below < above if self.operator == "<" else above < below
        return Outcome("holds" if is_claimed else "fails", min(1.0, 2 * min(below, above)))

    def detectable(self) -> float:
        """The gap that so many seeds show in 80 % of all cases at this spread."""
        n = self.between.n
        return gap_in_deviations(n) * _deviation(self.between)


@dataclass(frozen=True)
class Equivalence:
    """Whether a mean difference lies within margins, by two seeds or more.

    Attributes:
        to_upper: summary of the difference less the upper margin.
        to_lower: summary of the difference less the lower margin.

    Example:
        >>> from flowbench.bench.statistics import summarise
        >>> within = Equivalence(summarise([-1.0, -1.1, -0.9]), summarise([1.0, 0.9, 1.1]))
        >>> within.outcome().towards, within.outcome().p < 0.05
        ('holds', True)
    """

    to_upper: Summary
    to_lower: Summary

    def outcome(self, n: int | None = None) -> Outcome:
        """The result, or what it would be with ``n`` seeds of the same means and spreads.

        It holds by the larger of the two one-sided probabilities. It fails by the order of the difference and a margin,
        two-sided, as a claim of order does.
        """
        below_upper, above_upper = _one_sided(self.to_upper, n)
        below_lower, above_lower = _one_sided(self.to_lower, n)
        if self.to_lower.mean >= 0 >= self.to_upper.mean:
            return Outcome("holds", max(below_upper, above_lower))
        return Outcome("fails", min(1.0, 2 * min(above_upper, below_lower)))

    def detectable(self) -> float:
        """The margin within which so many seeds show equal sides to be in 80 % of all cases at this spread."""
        n = self.to_upper.n
        # Each of the two tests may miss in half of the cases that may be missed.
        shift = float(nctdtrinc(n - 1, (1 - POWER) / 2, stdtrit(n - 1, 1 - ALPHA)))
        return shift / math.sqrt(n) * max(_deviation(self.to_upper), _deviation(self.to_lower))


def gap_in_deviations(n: int) -> float:
    """The gap that ``n`` seeds show in 80 % of all cases, in standard deviations of the paired difference.

    Args:
        n: number of seeds, at least 2.
    """
    return float(nctdtrinc(n - 1, 1 - POWER, stdtrit(n - 1, 1 - ALPHA / 2))) / math.sqrt(n)


def seeds_to_settle(outcome: Callable[[int], Outcome], n: int) -> int | None:
    """The smallest number of seeds above ``n`` whose result is decided; None where 1,000 do not suffice.

    Args:
        outcome: the result that a number of seeds would have.
        n: number of seeds that were trained.
    """
    more = range(n + 1, MOST_SEEDS + 1)
    # At one mean and spread the probability falls with every seed.
    first = bisect_left(more, True, key=lambda number: outcome(number).is_decided)
    return more[first] if first < len(more) else None


def ratio_interval(
    left: Sequence[float], right: Sequence[float], level: float = 1 - ALPHA
) -> tuple[float, float] | None:
    """Fieller's interval of mean(left) / mean(right): the ratios r for which ``left - r * right`` may be 0 in the mean.

    Args:
        left: two values or more.
        right: as many, paired with them.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper end; None where the right mean itself may be 0, so that any ratio is possible.
    """
    n = len(left)
    ((left_left, left_right), (_, right_right)) = np.cov(left, right) * stdtrit(n - 1, 0.5 + level / 2) ** 2 / n
    mean_left, mean_right = float(np.mean(left)), float(np.mean(right))
    square = mean_right**2 - right_right
    if square <= 0:
        return None
    middle = mean_left * mean_right - left_right
    root = math.sqrt(max(0.0, middle**2 - square * (mean_left**2 - left_left)))
    return float((middle - root) / square), float((middle + root) / square)


def _one_sided(summary: Summary, n: int | None) -> tuple[float, float]:
    """Probabilities of a mean as low, and as high, if it were 0: small ones show that it is below, or above."""
    n = summary.n if n is None else n
    error = _deviation(summary) / math.sqrt(n)
    if error == 0:
        return float(summary.mean >= 0), float(summary.mean <= 0)
    t = summary.mean / error
    return float(stdtr(n - 1, t)), float(stdtr(n - 1, -t))


def _deviation(summary: Summary) -> float:
    assert summary.sd is not None, "one seed has no spread"
    return summary.sd
