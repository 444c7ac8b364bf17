"""Means, intervals and paired differences over training seeds.

Intervals are Student's t at 95 %. Contenders share data order and noise at equal seeds, so differences are
formed seed by seed (paired), which removes the variance that both share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from flowbench.core.rows import Goal

__all__ = [
    "ROUNDING",
    "Summary",
    "best_and_ties",
    "difference",
    "paired_difference",
    "summarise",
    "unpaired_difference",
]

ROUNDING = 1e-9
"""Numbers that differ by less than this share of the larger one are equal: sums in float64 round at 1e-16, and no
measured difference that matters is as small."""


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation and half width of the t-interval of ``n`` values; None where n = 1.

    Example:
        >>> summary = summarise([1.0, 2.0, 3.0])
        >>> summary.n, summary.mean, round(summary.half, 2)
        (3, 2.0, 2.48)
        >>> paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).is_tie
        True
    """

    n: int
    mean: float
    sd: float | None
    half: float | None

    @property
    def is_tie(self) -> bool | None:
        """Whether the interval contains 0; None without an interval."""
        return None if self.half is None else abs(self.mean) <= self.half

    @property
    def is_zero(self) -> bool:
        """Whether every value is 0: as a difference, that both sides are equal."""
        return self.mean == 0 and not self.sd


def difference(left: float, right: float) -> float:
    """``left - right``; 0 where the two differ by rounding alone (see ``ROUNDING``)."""
    return 0.0 if math.isclose(left, right, rel_tol=ROUNDING) else left - right


def summarise(values: Sequence[float], level: float = 0.95) -> Summary:
    """Mean and t-interval of independent values.

    Args:
        values: at least one finite number.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: without values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    # A sum of equal values rounds, and they would seem to have a spread.
    mean = values[0] if min(values) == max(values) else math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = float(stdtrit(n - 1, 0.5 + level / 2))
    return Summary(n, mean, sd, quantile * sd / math.sqrt(n))


def paired_difference(left: Mapping[int, float], right: Mapping[int, float]) -> Summary | None:
    """Summary of left - right, up to rounding, over the seeds that both have; None when they share no seed."""
    seeds = sorted(left.keys() & right.keys())
    return summarise([difference(left[seed], right[seed]) for seed in seeds]) if seeds else None


def unpaired_difference(left: Sequence[float], right: Sequence[float], level: float = 0.95) -> Summary:
    """Mean of left - right with Welch's t-interval, for values that share no seed.

    Args:
        left: at least two finite numbers.
        right: at least two finite numbers.
        level: coverage of the interval, in (0, 1).

    Returns:
        ``n`` is the smaller number of values, ``sd`` that of one difference of independent values.

    Raises:
        ValueError: when a side has fewer than two values.
    """
    sides = summarise(left, level), summarise(right, level)
    if min(side.n for side in sides) < 2:
        raise ValueError(f"an interval needs two values on each side, got {sides[0].n} and {sides[1].n}")
    n, mean = min(side.n for side in sides), difference(sides[0].mean, sides[1].mean)
    variances = [float(side.sd or 0.0) ** 2 / side.n for side in sides]
    if not sum(variances):
        return Summary(n, mean, 0.0, 0.0)
    freedom = sum(variances) ** 2 / sum(v**2 / (side.n - 1) for v, side in zip(variances, sides, strict=True))
    half = float(stdtrit(freedom, 0.5 + level / 2)) * math.sqrt(sum(variances))
    return Summary(n, mean, math.sqrt(sum(float(side.sd or 0.0) ** 2 for side in sides)), half)


def best_and_ties(values: Mapping[str, Mapping[int, float]], goal: Goal) -> set[str]:
    """The contender with the best mean, and those whose paired difference to it is not significant.

    Args:
        values: contender -> seed -> value; contenders without values are passed over.
        goal: which direction is better.

    Returns:
        Names; empty when the goal is ``none`` or fewer than two contenders have values. With one seed there
        is no interval and only the best is returned.
    """
    present = {name: _as_cost(by_seed, goal) for name, by_seed in values.items() if by_seed}
    if goal == "none" or len(present) < 2:
        return set()
    means = {name: summarise(list(by_seed.values())).mean for name, by_seed in present.items()}
    best = min(means, key=lambda name: means[name])
    winners = {best} | {name for name in means if difference(means[name], means[best]) == 0}
    for name, by_seed in present.items():
        paired = paired_difference(by_seed, present[best])
        if paired is not None and paired.is_tie:
            winners.add(name)
    return winners


def _as_cost(by_seed: Mapping[int, float], goal: Goal) -> dict[int, float]:
    if goal == "zero":
        return {seed: abs(value) for seed, value in by_seed.items()}
    return {seed: -value if goal == "up" else value for seed, value in by_seed.items()}
