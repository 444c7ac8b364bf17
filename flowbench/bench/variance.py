"""How much of the spread of a number is the training's, and how much that of drawing samples to measure it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowbench.bench.results import Results
from flowbench.bench.tables import COST, Entry, TextTable

__all__ = ["Components", "variance_components", "variance_table"]

_NOTE = (
    "One-way random effects: the sampling variance is that of the evaluation seeds within a training; the training "
    "variance is what the means of the trainings vary by beyond it, 0 (marked *) where they vary by less. Shares are "
    "of the variance of one number of one training. Few seeds estimate a variance badly."
)


@dataclass(frozen=True)
class Components:
    """Variances of a number, by their cause.

    Attributes:
        trainings: groups.
        measurements: values of all groups.
        training: variance between trainings; None with one training. Not below 0.
        sampling: variance of the evaluation within a training.
        negative: whether the estimate between trainings is below 0, and is set to 0.
    """

    trainings: int
    measurements: int
    training: float | None
    sampling: float
    negative: bool = False

    @property
    def share(self) -> float | None:
        """Share of the training in the variance of one number; None where there is none, or it is not known."""
        total = (self.training or 0.0) + self.sampling
        return self.training / total if self.training is not None and total > 0 else None


def variance_components(groups: Sequence[Sequence[float]]) -> Components | None:
    """The one-way random-effects decomposition by mean squares.

    With N values in k groups of n_i: the mean square within, MSW = sum (x - mean_i)^2 / (N - k), estimates the sampling
    variance; that between, MSB = sum n_i (mean_i - mean)^2 / (k - 1), has the expectation sampling + n0 training, where
    n0 = (N - sum n_i^2 / N) / (k - 1).

    Args:
        groups: the values of each training; those without values are passed over.

    Returns:
        The components, or None where no training was measured twice.
    """
    groups = [group for group in groups if group]
    k, total = len(groups), sum(map(len, groups))
    if total <= k:
        return None
    means = [math.fsum(group) / len(group) for group in groups]
    within = math.fsum((x - mean) ** 2 for group, mean in zip(groups, means, strict=True) for x in group) / (total - k)
    if k == 1:
        return Components(1, total, None, within)
    grand = math.fsum(x for group in groups for x in group) / total
    between = math.fsum(len(g) * (mean - grand) ** 2 for g, mean in zip(groups, means, strict=True)) / (k - 1)
    size = (total - sum(len(group) ** 2 for group in groups) / total) / (k - 1)
    estimate = (between - within) / size
    return Components(k, total, max(0.0, estimate), within, estimate < 0)


def variance_table(plan: Mapping[str, Any], results: Results, problem: str) -> TextTable | None:
    """Standard deviations of training and of sampling by contender and metric; None without evaluation seeds."""
    if len(plan.get("seed_axes", {}).get("evaluation", ())) < 2:
        return None
    title = "Spread of training and of sampling" + (f": {problem}" if problem else "")
    header = ["contender", "metric", "training sd", "sampling sd", "share of training", "trainings", "measurements"]
    table = TextTable(title, header, notes=[_NOTE])
    for name in plan["problems"].get(problem, []):
        for metric in results.metrics(problem, name):
            if results.group(metric) != COST and (found := _components(results, problem, name, metric)) is not None:
                table.rows.append([Entry(name), Entry(metric), *map(Entry, _texts(found))])
    return table if table.rows else None


def _components(results: Results, problem: str, name: str, metric: str) -> Components | None:
    main = results.values(problem, name, metric)
    again = results.sweep(problem, name, metric, "evaluation_seed")
    measured = [main, *again.values()]
    return variance_components([[v[seed] for v in measured if seed in v] for seed in sorted(main)])


def _texts(found: Components) -> list[str]:
    training = "–" if found.training is None else f"{math.sqrt(found.training):.3g}{'*' * found.negative}"
    share = "–" if found.share is None else f"{found.share:.0%}"
    return [training, f"{math.sqrt(found.sampling):.3g}", share, str(found.trainings), str(found.measurements)]
