"""Two contenders along a sweep at equal value of another metric, e.g. distances at equal class accuracy.

On each seed the swept points of a contender are joined by straight lines in the plane of the two metrics. Over the
values of the matched metric that both contenders reach, the mean of each line is taken: their difference is
Bjontegaard's (2001) average difference of two curves, with straight lines for his cubics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flowbench.bench.claims import Matched, Quantity
from flowbench.bench.results import Results
from flowbench.core.rows import Goal
from flowbench.core.sweep import SWEEP_AXES, SweepAxis

__all__ = ["Averages", "Curve", "average_at_equal", "describe_ranges", "read_curves", "swept_axis"]

_VALUES = 201  # of the matched metric between the ends of the range that both reach

Curve = tuple[np.ndarray, np.ndarray]
"""Matched metric and compared metric at the points of a sweep in their order, each of shape (P,)."""


@dataclass(frozen=True)
class Averages:
    """Means over the range of the matched metric that both sides reach, and that range.

    Example:
        >>> import numpy as np
        >>> line = np.array([0.0, 1.0])
        >>> average_at_equal((line, line), (line, line + 2), "down")
        Averages(left=0.5, right=2.5, low=0.0, high=1.0)
    """

    left: float
    right: float
    low: float
    high: float


def swept_axis(results: Results, problem: str, side: Quantity, matched: Matched) -> SweepAxis | None:
    """The axis that the claim names, else the first along which the side was measured; None where there is none."""
    if matched.axis is not None:
        return matched.axis
    measured = (axis for axis in SWEEP_AXES if results.sweep(problem, side.contender, side.metric, axis))
    return next(measured, None)


def read_curves(
    results: Results, problem: str, side: Quantity, matched: Matched, axis: SweepAxis
) -> tuple[dict[int, Curve], dict[int, str]]:
    """A side's curve on each seed, and for the seeds without a complete one the reason.

    Args:
        results: the rows.
        problem: problem name.
        side: what is compared; its factor and margin are applied.
        matched: what is held equal.
        axis: what is swept.
    """
    swept = {name: results.sweep(problem, side.contender, name, axis) for name in (side.metric, matched.metric)}
    points = sorted(set().union(*swept.values()))
    lost: dict[int, str] = {}
    for name in swept:
        for point in points:
            for seed, reason in results.gaps(problem, side.contender, name, point, axis).items():
                lost.setdefault(seed, f"{name} at {point:g} {reason}")
    seeds = {seed for by_point in swept.values() for by_seed in by_point.values() for seed in by_seed}

    def values(name: str, seed: int) -> np.ndarray:
        return np.array([swept[name][point][seed] for point in points])

    curves = {
        seed: (values(matched.metric, seed), side.factor * values(side.metric, seed) + side.margin)
        for seed in sorted(seeds - lost.keys())
        if all(seed in swept[name].get(point, {}) for name in swept for point in points)
    }
    return curves, lost


def average_at_equal(left: Curve, right: Curve, goal: Goal) -> Averages | str:
    """Means of two curves over the range of the matched metric that both reach.

    Args:
        left: one curve.
        right: the other.
        goal: which value of the compared metric is better: where a curve passes a value of the matched metric more than
            once, the better of its values counts, as a user would choose it.

    Returns:
        The means, or why there are none.
    """
    low, high = max(left[0].min(), right[0].min()), min(left[0].max(), right[0].max())
    if low > high:
        return f"the ranges do not overlap: {_range(left)} against {_range(right)}"
    if goal not in ("down", "up") and not (_is_monotone(left) and _is_monotone(right)):
        return "it neither rises nor falls all along the sweep, and none of several values is the better one"
    targets = np.linspace(low, high, _VALUES)
    means = [float(np.mean((line[1:] + line[:-1]) / 2)) for line in (_along(c, targets, goal) for c in (left, right))]
    return Averages(means[0], means[1], float(low), float(high))


def _along(curve: Curve, targets: np.ndarray, goal: Goal) -> np.ndarray:
    """The better value of a curve at each target within its range, shape (T,)."""
    matched, compared = curve
    better = np.fmax if goal == "up" else np.fmin  # which pass over NaN
    found = np.full(targets.shape, np.nan)
    # Each point stands for itself too: a curve may have only one, and neighbours may have one matched value.
    for start, end in zip(range(len(matched)), (*range(1, len(matched)), len(matched) - 1), strict=True):
        (q0, q1), (v0, v1) = matched[[start, end]], compared[[start, end]]
        share = (targets - q0) / (q1 - q0) if q0 != q1 else np.where(targets == q0, 0.0, np.nan)
        inside = (share >= 0) & (share <= 1)
        value = v0 + share * (v1 - v0) if q0 != q1 else np.full(targets.shape, better(v0, v1))
        found = np.where(inside, better(found, value), found)
    return found


def _is_monotone(curve: Curve) -> bool:
    steps = np.diff(curve[0])
    return bool((steps > 0).all() or (steps < 0).all())


def _range(curve: Curve) -> str:
    return f"{curve[0].min():.4g} to {curve[0].max():.4g}"


def describe_ranges(found: Mapping[int, Averages]) -> str:
    """The range over which the seeds were compared, as the mean of its ends."""
    low, high = (float(np.mean([getattr(a, end) for a in found.values()])) for end in ("low", "high"))
    return f"{low:.4g} to {high:.4g}"
