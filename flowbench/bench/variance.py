"""How much of the spread of a number is the training's, and how much that of drawing samples to measure it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowbench.bench.results import Results
from flowbench.bench.seed_axes import TRAINING_AXES, Seeds
from flowbench.bench.tables import COST, Entry, TextTable

__all__ = ["Components", "idle_axes", "variance_components", "variance_table"]

_NOTE = (
    "Two-way random effects of trainings and evaluation seeds, which all trainings share: the sampling variance is "
    "that of one training's number over evaluation seeds, with what they move in all trainings alike; the training "
    "variance is that of the trainings' means beyond what sampling leaves in them, 0 (marked *) where they vary by "
    "less. Shares are of the variance of one number of one training. Few seeds estimate a variance badly."
)


@dataclass(frozen=True)
class Components:
    """Variances of a number, by their cause.

    Attributes:
        trainings: rows.
        measurements: values of all rows.
        training: variance between trainings; None with one training. Not below 0.
        sampling: variance over the seeds of the evaluation.
        negative: whether the estimate between trainings is below 0, and is set to 0.

    Example:
        >>> found = variance_components([[1.0, 3.0], [5.0, 7.0]])
        >>> found.training, found.sampling, found.share
        (8.0, 2.0, 0.8)
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


def variance_components(table: Sequence[Sequence[float]]) -> Components | None:
    """The two-way random-effects decomposition by mean squares, without replicates.

    A number of training i under evaluation seed j is mean + T_i + E_j + R_ij: samples of all trainings begin with the
    same noise, so that a seed which is kind to one is kind to others. With I trainings and J seeds the mean squares
    of the row means, the column means and the residuals estimate J var T + var R, I var E + var R and var R. A model
    without E would take its variance for sampling alone, and from the training's.

    Args:
        table: the values of each training, one for each seed of the evaluation; rows of equal length.

    Returns:
        The components, or None with fewer than two seeds of the evaluation.
    """
    values = np.array(table, dtype=np.float64)
    if values.size == 0 or values.shape[1] < 2:
        return None
    trainings, evaluations = values.shape
    if (values == values[:, :1]).all():  # a likelihood draws nothing by this seed: exactly none
        training = float(values[:, 0].var(ddof=1)) if trainings > 1 else None
        return Components(trainings, values.size, training, 0.0)
    if trainings == 1:
        return Components(1, evaluations, None, float(values.var(ddof=1)))
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    residual = ((values - rows - columns + values.mean()) ** 2).sum() / ((trainings - 1) * (evaluations - 1))
    by_training = evaluations * rows.var(ddof=1)
    by_evaluation = trainings * columns.var(ddof=1)
    estimate = float(by_training - residual) / evaluations
    sampling = float(by_evaluation + (trainings - 1) * residual) / trainings  # var E + var R
    return Components(trainings, values.size, max(0.0, estimate), sampling, estimate < 0)


def variance_table(plan: Mapping[str, Any], results: Results, problem: str) -> TextTable | None:
    """Standard deviations of training and of sampling by contender and metric; None without evaluation seeds."""
    seeds = Seeds.of_plan(plan)
    if not seeds.evaluations:
        return None
    title = "Spread of training and of sampling" + (f": {problem}" if problem else "")
    header = ["contender", "metric", "training sd", "sampling sd", "share of training", "trainings", "measurements"]
    table = TextTable(title, header, notes=[_NOTE])
    for name in plan["problems"].get(problem, []):
        metrics = [metric for metric in results.metrics(problem, name) if results.group(metric) != COST]
        main = {metric: results.values(problem, name, metric) for metric in metrics}
        idle = idle_axes(seeds, main.values())
        if idle:
            words = " and ".join(idle)
            table.notes.append(
                f"{name}: the seed of {words} changes no number. Trainings that differ in it alone are one training, "
                "which stands here once; in the other tables and in claims it counts each time."
            )
        # One of those that are the same training.
        kept = [number for number in seeds.numbers if all(seeds.of(number)[a] == seeds.axes[a][0] for a in idle)]
        for metric in metrics:
            again = results.sweep(problem, name, metric, "evaluation_seed")
            measured = [main[metric], *again.values()]
            complete = [[v[number] for v in measured] for number in kept if all(number in v for v in measured)]
            if (found := variance_components(complete)) is not None:
                table.rows.append([Entry(name), Entry(metric), *map(Entry, _texts(found))])
    return table if table.rows else None


def idle_axes(seeds: Seeds, measured: Iterable[Mapping[int, float]]) -> list[str]:
    """Axes of the training whose seeds change no number of a contender, because it draws nothing by them.

    Args:
        seeds: of the bench.
        measured: the values of each metric by the number of the training.
    """
    values = [by for by in measured if by]
    found = []
    for axis in TRAINING_AXES:
        alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for number in seeds.numbers:
            others = tuple((name, seed) for name, seed in seeds.of(number).items() if name != axis)
            alike.setdefault(others, []).append(number)
        pairs = [(numbers[0], other) for numbers in alike.values() for other in numbers[1:]]
        same = [by[one] == by[other] for by in values for one, other in pairs if one in by and other in by]
        if same and all(same):
            found.append(axis)
    return found


def _texts(found: Components) -> list[str]:
    training = "–" if found.training is None else f"{math.sqrt(found.training):.3g}{'*' * found.negative}"
    share = "–" if found.share is None else f"{found.share:.0%}"
    return [training, f"{math.sqrt(found.sampling):.3g}", share, str(found.trainings), str(found.measurements)]
