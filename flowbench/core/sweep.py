"""The axes of a sweep over sampler settings or training sizes, and the reader of their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from flowbench.core.checks import LARGEST, check_numbers

__all__ = ["BENCH_AXES", "BEST", "MOST_EVALUATIONS", "SWEEP_AXES", "SweepAxis", "best_axis", "place_name", "read_sweep"]

SweepAxis = Literal[
    "network_evaluations", "guidance", "train_size", "evaluation_seed", "best_network_evaluations", "best_guidance"
]
"""Network evaluations per sample, the scale of the guidance, 1 = none, the number of training samples, the seed of the
evaluation, or the best of the first two, which was chosen for each cell."""

BEST = "best_"

SWEEP_AXES: tuple[SweepAxis, ...] = ("network_evaluations", "guidance")
"""Those along which one trained model is measured again."""

BENCH_AXES: tuple[SweepAxis, ...] = (*SWEEP_AXES, "train_size")
"""Those that a bench sweeps: it trains a model for each training size."""

MOST_EVALUATIONS = 10**6


def best_axis(axis: str) -> SweepAxis:
    """The axis of the rows at the best point of another axis, whose place on it is the choice."""
    return cast(SweepAxis, f"{BEST}{axis}")


def place_name(axis: str, at: float | None) -> str:
    """A point of a sweep as claims write it: `@8`, `@guidance=3`, `@guidance=best`; empty outside of any.

    Args:
        axis: one of :data:`SweepAxis`, or empty.
        at: the point; of no account where the best one was chosen.
    """
    if axis.startswith(BEST):
        return f"@{axis.removeprefix(BEST)}=best"
    if at is None:
        return ""
    return f"@{'' if axis == 'network_evaluations' else f'{axis}='}{at:g}"


def read_sweep(name: str, value: object, axes: Sequence[SweepAxis] = SWEEP_AXES) -> dict[SweepAxis, list[float]]:
    """The points of ``sweep:`` of an evaluator or a bench.

    Args:
        name: what the user calls it, e.g. ``evaluator.sweep``.
        value: ``{network_evaluations: [1, 2, 4], guidance: [1, 1.5]}``: distinct whole numbers from 1 to 1e6, distinct
            scales or whole training sizes from 1 to 1e12. An axis that is null or empty is not swept, and None sweeps
            nothing.
        axes: those that there are.

    Returns:
        Points of each axis that is swept, in the order given; all but scales are of type int.

    Raises:
        ValueError: one line: no mapping, an unknown axis, or points that cannot be imposed.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, e.g. {{network_evaluations: [1, 2, 4]}}, got {value!r}")
    unknown = [str(axis) for axis in value if axis not in axes]
    if unknown:
        raise ValueError(f"{name} goes over {', '.join(axes[:-1])} and {axes[-1]}, got {', '.join(unknown)}")
    return {axis: _points(f"{name}.{axis}", axis, value[axis]) for axis in value if value[axis] not in (None, [], ())}


def _points(name: str, axis: str, points: Any) -> list[float]:
    whole = axis != "guidance"
    check_numbers(name, points, at_least=1, at_most=MOST_EVALUATIONS if axis == "network_evaluations" else LARGEST)
    for index, point in enumerate(points):
        if whole and point != int(point):
            raise ValueError(f"{name} must be whole numbers >= 1, got {point!r}")
        if point in points[:index]:
            raise ValueError(f"{name} must be distinct numbers, got {point!r} twice")
    return [int(point) for point in points] if whole else list(points)
