"""The axes of a sweep over sampler settings, and the reader of their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from flowbench.core.checks import LARGEST, check_numbers

__all__ = ["MOST_EVALUATIONS", "SWEEP_AXES", "SweepAxis", "read_sweep"]

SweepAxis = Literal["network_evaluations", "guidance"]
"""Network evaluations per sample, or the scale of the guidance, 1 = none."""

SWEEP_AXES: tuple[SweepAxis, ...] = get_args(SweepAxis)

MOST_EVALUATIONS = 10**6


def read_sweep(name: str, value: object) -> dict[SweepAxis, list[float]]:
    """The points of ``sweep:`` of an evaluator or a bench.

    Args:
        name: what the user calls it, e.g. ``evaluator.sweep``.
        value: ``{network_evaluations: [1, 2, 4], guidance: [1, 1.5]}``: distinct whole numbers from 1 to 1e6, distinct
            scales from 1 to 1e12. An axis that is null or empty is not swept, and None sweeps nothing.

    Returns:
        Points of each axis that is swept, in the order given; network evaluations are of type int.

    Raises:
        ValueError: one line: no mapping, an unknown axis, or points that cannot be imposed.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, e.g. {{network_evaluations: [1, 2, 4]}}, got {value!r}")
    unknown = [str(axis) for axis in value if axis not in SWEEP_AXES]
    if unknown:
        raise ValueError(f"{name} goes over {' and '.join(SWEEP_AXES)}, got {', '.join(unknown)}")
    return {axis: _points(f"{name}.{axis}", axis, value[axis]) for axis in value if value[axis] not in (None, [], ())}


def _points(name: str, axis: str, points: Any) -> list[float]:
    evaluations = axis == "network_evaluations"
    check_numbers(name, points, at_least=1, at_most=MOST_EVALUATIONS if evaluations else LARGEST)
    for index, point in enumerate(points):
        if evaluations and point != int(point):
            raise ValueError(f"{name} must be whole numbers >= 1, got {point!r}")
        if point in points[:index]:
            raise ValueError(f"{name} must be distinct numbers, got {point!r} twice")
    return [int(point) for point in points] if evaluations else list(points)
