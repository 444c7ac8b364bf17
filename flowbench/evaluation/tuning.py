"""The point of a sweep that a flow does best at, chosen on the validation split and told on the test measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from flowbench.core.rows import Row
from flowbench.core.seeds import derive_seed
from flowbench.core.sweep import BEST
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import Failures
from flowbench.evaluation.measurement import Measurement
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Setup
from flowbench.evaluation.samples import RealSet
from flowbench.evaluation.score import score

__all__ = ["best_rows", "choose", "choosing", "is_declared"]

_SPLIT: Literal["val"] = "val"


def is_declared(by: str, metrics: Mapping[str, Metric]) -> bool:
    """Whether a metric of a sweep has a name like `by`, whatever its brackets hold: `auto` is not named yet."""
    base = by.partition("[")[0]
    return any(m.in_sweep and base in {name.partition("[")[0] for name in m.names} for m in metrics.values())


def choosing(by: str, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics that have the number by which a point is chosen, once their extractors are named.

    Raises:
        ValueError: none of a sweep has it, neither value of it is better, or it cannot be measured on the validation
            split.
    """
    swept = {key: metric for key, metric in metrics.items() if metric.in_sweep}
    found = {key: metric for key, metric in swept.items() if by in metric.names}
    if not found:
        known = ", ".join(name for metric in swept.values() for name in metric.names) or "none"
        raise ValueError(f"evaluator.best_by names {by}, which no metric has in a sweep; there are: {known}")
    for metric in found.values():
        metric.check_reference(_SPLIT)
        if metric.info(by).goal == "none":
            raise ValueError(f"evaluator.best_by: no value of {by} is better than another; name another metric")
    return found


def choose(
    by: str,
    metrics: Mapping[str, Metric],
    setup: Setup,
    points: Iterable[SamplerOverride],
    ask: Callable[[Setup, Mapping[str, Metric]], Answers],
    failures: Failures,
) -> dict[str, float]:
    """The best point of every axis of a sweep, on the validation split and from noise that is used for nothing else.

    Args:
        by: name of the number.
        metrics: all, with their extractors named.
        setup: with what the module is asked.
        points: those of the sweep.
        ask: asks what metrics look at, on all processes.
        failures: keeps the mistakes of the code.

    Returns:
        Axis -> point, on process 0; nothing on others. Of equal values the first point counts, and an axis without a
        finite value is absent.
    """
    chosen, validation = choosing(by, metrics), RealSet(setup.data, _SPLIT)
    seed = derive_seed(setup.seed, "tuning") % 2**31
    tuning = replace(setup, reference=validation, held_out=validation, likelihood_split=_SPLIT, seed=seed)
    costs: dict[str, dict[float, float]] = {}
    for point in points:
        answers = ask(replace(tuning, override=point), chosen)
        for measured in score(answers, chosen, failures) if setup.rank == 0 else ():
            # A likelihood that has not converged is no number: the cruder the solver, the better it may look.
            counts = math.isfinite(measured.value) and not measured.unconverged
            if measured.metric == by and counts and point.at is not None:
                costs.setdefault(point.axis, {})[point.at] = _cost(measured)
    return {axis: min(found, key=lambda at: found[at]) for axis, found in costs.items()}


def best_rows(by: str, rows: Iterable[Row], choices: Mapping[str, float]) -> Iterator[Row]:
    """The rows of the chosen points again, under the axes of what was chosen: their `at` is the choice.

    Args:
        by: the number by which it was.
        rows: those of the sweep.
        choices: axis -> point.
    """
    for row in rows:
        if row.axis in choices and row.at == choices[row.axis]:
            provenance: dict[str, Any] = {**row.provenance, "best_by": f"{by} on {_SPLIT}"}
            yield replace(row, axis=f"{BEST}{row.axis}", provenance=provenance)


def _cost(measured: Measurement) -> float:
    """The less, the better."""
    value = measured.value
    return abs(value) if measured.goal == "zero" else -value if measured.goal == "up" else value
