"""One number, and what its metric declares about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flowbench.core.rows import Goal
from flowbench.core.sweep import SweepAxis

__all__ = ["Measurement", "MetricInfo", "SweptName", "unmeasured"]

SweptName = Literal["", SweepAxis]
"""The axis of a sweep; empty outside of one."""


@dataclass(frozen=True)
class MetricInfo:
    """What a reader must know of a metric; the metric itself is the only place that states it.

    Attributes:
        name: as in rows, e.g. `fd[digits-cnn]`.
        goal: `down` where lower is better, `up`, `zero` (nearer to 0), `none` where neither is.
        group: the table that it belongs to, e.g. `quality`, `transport`, `cost`.
        always: everybody whom the metric measures has this number; else it depends on who that is.
        beside: the number that says what this one is worth, where it means little alone: a claim on it is refused
            without that one, and so is one that sets it against another metric.
    """

    name: str
    goal: Goal = "none"
    group: str = "quality"
    always: bool = True
    beside: str = ""


@dataclass(frozen=True)
class Measurement:
    """One number with what makes it comparable.

    Attributes:
        metric: e.g. `fd[digits-cnn]`.
        value: the number.
        n: samples behind it.
        protocol: extractor, split, N and whatever else the number depends on.
        unit: e.g. `bits/dim`; empty for pure numbers.
        reason: why it could not be measured, one line; empty for a number.
        unconverged: why it is no value of what it is named after, one line with its error; empty where it is. The
            number stands in its row, and in no comparison.
        details: what belongs to the number and is none of its own, for the provenance of its row; JSON values.
        goal: which value is better, see :class:`MetricInfo`; the evaluator fills it in from what the metric declares.
        group: the table that it belongs to; filled in likewise.
    """

    metric: str
    value: float
    n: int | None
    protocol: str
    unit: str = ""
    reason: str = ""
    unconverged: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    goal: Goal = "none"
    group: str = "quality"


def unmeasured(names: Iterable[str], reason: str) -> list[Measurement]:
    """Measurements that could not be made, in place of their numbers.

    Args:
        names: of the metrics.
        reason: one line.
    """
    return [Measurement(name, math.nan, None, "", reason=reason) for name in names]
