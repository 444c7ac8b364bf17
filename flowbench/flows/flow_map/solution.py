"""Objectives that compare a jump with the rest of it, a little later along the path: one evaluation, no derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.checks import check_number
from flowbench.flows.flow_map.base import ANYWHERE, TO_DATA, FlowMapObjective, JumpBatch, jumped
from flowbench.flows.flow_map.derivative import AverageVelocity, spread
from flowbench.flows.flow_map.times import SHORTEST, JumpTimes
from flowbench.flows.time import TimeDistribution, UniformTimes

__all__ = ["ConsistencyTraining", "JumpsToData", "SolutionConsistency"]


class _LaterPoint(FlowMapObjective):
    """An objective that compares with a point later on the path, after a share r of the jump.

    The share falls geometrically with the training's progress. Nearby values are subtracted, so they are float32.

    Args:
        first: r at the beginning, in (0, 1].
        last: r at the end, in (0, first].
        weight_power: see :class:`FlowMapObjective`.
    """

    needs_full_precision = True

    def __init__(self, first: float, last: float, weight_power: float) -> None:
        super().__init__(weight_power)
        check_number("first", first, above=0, at_most=1, hint="a share of the jump")
        check_number("last", last, above=0, at_most=1, hint="a share of the jump")
        if last > first:
            raise ValueError(f"last={last:g} is above first={first:g}: the share of the jump falls during the training")
        self.first = first
        self.last = last

    def share(self, progress: float) -> float:
        """The share r of the jump when this share of the training is over."""
        return self.first * (self.last / self.first) ** progress

    def extra_repr(self) -> str:
        """See :meth:`FlowMapObjective.extra_repr`."""
        return ", ".join(filter(None, (f"first={self.first:g}, last={self.last:g}", super().extra_repr())))


class SolutionConsistency(_LaterPoint):
    """SoFlow: where a point is carried does not depend on whether it first moves a little along its path.

    With l = s + r (t - s) the residual is the quotient ``(X(x_s, s, t) - X(x_s + (l - s) v, l, t)) / (l - s)``, v the
    velocity of the pair, and its gradient reaches the first average velocity alone. It is unbiased in the limit r -> 0,
    where it is MeanFlow's; at r the error is of first order in r. The share r falls geometrically with the training's
    progress from `first` to `last`, so that a run that is stopped half way is not a run of half the length.

    Its target has the end of the jump, so jumps to one time are enough of each other: :class:`JumpsToData` will do.

    Args:
        first: r at the beginning, in (0, 1].
        last: r at the end, in (0, first].
        weight_power: see :class:`FlowMapObjective`.

    Raises:
        ValueError: for a number out of range.

    References:
        SoFlow, 2025, arXiv 2512.15657.

    Example:
        >>> objective = SolutionConsistency(first=0.1, last=0.001)
        >>> [round(objective.share(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [0.1, 0.01, 0.001]
    """

    needed_jump = TO_DATA
    goes_back = True

    def __init__(self, first: float = 0.1, last: float = 0.002, weight_power: float = 0.0) -> None:
        super().__init__(first, last, weight_power)

    def residual(self, u: AverageVelocity, batch: JumpBatch, predicted: tuple[Tensor, ...]) -> Tensor:
        """The quotient, as the difference of the prediction and what it should be."""
        (velocity,) = predicted
        with torch.no_grad():
            later = batch.start + self.share(batch.progress) * batch.length
            gap = spread(later - batch.start, batch.x)
            rest = u(batch.x + gap * batch.velocity, later, batch.end)
            # The quotient is u - target: both maps hold x_s, which is taken out before anything is subtracted.
            slope = (rest - velocity) * (spread(batch.end - later, batch.x) / gap)
            target = batch.velocity + slope
        return velocity - target


class JumpsToData(JumpTimes):
    """Jumps that end at the data, time 1.

    Args:
        start: where they start; None is uniform.

    Example:
        >>> start, end = JumpsToData().sample(3, torch.Generator().manual_seed(0))
        >>> end, bool((start < end).all())
        (tensor([1., 1., 1.]), True)
        >>> JumpsToData().covers(0.5, 1.0), JumpsToData().covers(0.0, 0.5)
        (True, False)
    """

    covered = "those to the data"

    def __init__(self, start: TimeDistribution | None = None) -> None:
        self.start = start or UniformTimes()

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """A start, and one."""
        start = self.start.sample(num, generator, device).clamp(max=1 - SHORTEST)
        return start, torch.ones_like(start)

    def covers(self, start: float, end: float) -> bool:
        """Jumps to the data."""
        return end == 1.0

    def __repr__(self) -> str:
        return f"JumpsToData(start={self.start!r})"


class ConsistencyTraining(_LaterPoint):
    """Consistency training: every point of a path between one source and one data point jumps to the same data point.

    Discrete consistency training from scratch (CT), in the easy form of ECT: the residual ``(X(x_s, s, 1) - X(x_l, l,
    1)) / sqrt(l - s)`` of two points of one pair's path, l = s + r (1 - s), whose gradient reaches the first alone. The
    division is ECT's weight by the difference of the noise levels. The share r falls geometrically with the training's
    progress; at r = 1 the second point is the data point itself. The continuous form (sCT) is not built: up to a weight
    it is :class:`MeanFlow` with jumps to data.

    Only jumps to time 1 are trained, so samples of several evaluations renoise (:class:`Renoise`).

    Args:
        first: r at the beginning, in (0, 1].
        last: r at the end, in (0, first].
        weight_power: see :class:`FlowMapObjective`.

    Raises:
        ValueError: for a number out of range.

    References:
        Song et al. 2023, Consistency Models; Geng et al. 2024, Consistency Models Made Easy (ECT).

    Example:
        >>> ConsistencyTraining().default_times
        JumpsToData(start=UniformTimes())
    """

    def __init__(self, first: float = 0.5, last: float = 0.01, weight_power: float = 0.0) -> None:
        super().__init__(first, last, weight_power)

    @property
    def default_times(self) -> JumpTimes:
        """Jumps to the data from anywhere."""
        return JumpsToData()

    def check_times(self, times: JumpTimes) -> None:
        """Only jumps to the data will do, and from anywhere."""
        self._check_direction(times)
        if times.covers(*ANYWHERE) or not times.covers(*TO_DATA):
            raise ValueError(f"ConsistencyTraining compares jumps to the data, got {times!r}: take JumpsToData")

    def residual(self, u: AverageVelocity, batch: JumpBatch, predicted: tuple[Tensor, ...]) -> Tensor:
        """The difference of the two jumps to the data, over the root of the time between them."""
        with torch.no_grad():
            later = torch.minimum(batch.start + self.share(batch.progress) * batch.length, batch.end)
            gap = spread(later - batch.start, batch.x)
            target = jumped(u, batch.x + gap * batch.velocity, later, batch.end)
        found = batch.x + spread(batch.length, batch.x) * predicted[0]
        return (found - target) / gap.sqrt()
