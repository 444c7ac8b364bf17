"""Objectives that compare a jump with two jumps over the same interval: two more evaluations, no derivative."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flowbench.flows.flow_map.base import FlowMapObjective, JumpBatch
from flowbench.flows.flow_map.derivative import AverageVelocity, spread
from flowbench.flows.flow_map.times import DyadicPairs, JumpTimes

__all__ = ["Progressive", "Shortcut"]

Split = Literal["midpoint", "uniform"]


class Progressive(FlowMapObjective):
    """Progressive self-distillation (PSD): one jump is what two jumps in its place are.

    The residual ``u(x, s, t) - a u(x, s, r) - (1 - a) u(X(x, s, r), r, t)`` with a = (r - s) / (t - s), whose gradient
    reaches the first average velocity alone. It vanishes at the map of any field: the velocities at equal times, which
    the diagonal's share of the batch learns, decide which.

    Args:
        split: where the two jumps meet: `midpoint`, or `uniform` between start and end.
        weight_power: see :class:`FlowMapObjective`.

    Raises:
        ValueError: for another split or a number out of range.

    References:
        Boffi, Albergo and Vanden-Eijnden 2025, arXiv 2505.18825.

    Example:
        >>> batch = JumpBatch(torch.ones(1, 1), torch.tensor([0.0]), torch.tensor([1.0]), torch.zeros(1, 1))
        >>> shrink = lambda x, s, t: x * ((s - t).exp() - 1) / (t - s)  # the map of dx/dt = -x
        >>> residual = Progressive().residual(shrink, batch, (shrink(batch.x, batch.start, batch.end),))
        >>> bool(residual.abs() < 1e-6)
        True
    """

    needs_velocity = False
    goes_back = True

    def __init__(self, split: Split = "midpoint", weight_power: float = 0.0) -> None:
        super().__init__(weight_power)
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
        self.split = split

    def residual(self, u: AverageVelocity, batch: JumpBatch, predicted: tuple[Tensor, ...]) -> Tensor:
        """The difference of one jump and two, over the length."""
        with torch.no_grad():
            target = self._two_jumps(u, batch)
        return predicted[0] - target

    def _two_jumps(self, u: AverageVelocity, batch: JumpBatch) -> Tensor:
        share = self._share(batch)
        middle = batch.start + share * batch.length
        first = u(batch.x, batch.start, middle)
        between = batch.x + spread(middle - batch.start, batch.x) * first
        weight = spread(share, batch.x)
        return weight * first + (1 - weight) * u(between, middle, batch.end)

    def _share(self, batch: JumpBatch) -> Tensor:
        if self.split == "midpoint":
            return torch.full_like(batch.start, 0.5)
        rng = batch.generator
        assert rng is not None, "a family hands its generator on"
        return torch.rand(len(batch.x), generator=rng, device=rng.device).to(batch.start)

    def extra_repr(self) -> str:
        """See :meth:`FlowMapObjective.extra_repr`."""
        return ", ".join(filter(None, (f"split={self.split}", super().extra_repr())))


class Shortcut(FlowMapObjective):
    """Shortcut models: on a dyadic grid, a jump is two jumps of half its length.

    :class:`Progressive` at midpoints, for jumps of length 1, 1/2, ..., 2^-levels. The halves of the shortest are Euler
    steps with the velocity at equal times. Samples are drawn with as many jumps as there are such jumps in a row, a
    power of two; others would ask the network for lengths that it has never seen, and are refused.

    Args:
        levels: the shortest jump has length 2^-levels, 1 to 9.
        weight_power: see :class:`FlowMapObjective`.

    Raises:
        ValueError: for a number out of range.

    References:
        Frans et al. 2024, One Step Diffusion via Shortcut Models.

    Example:
        >>> Shortcut(levels=3).default_times
        DyadicPairs(levels=3)
    """

    needs_velocity = False

    def __init__(self, levels: int = 6, weight_power: float = 0.0) -> None:
        super().__init__(weight_power)
        self.times = DyadicPairs(levels)
        self.levels = levels

    @property
    def default_times(self) -> JumpTimes:
        """The grid."""
        return self.times

    def check_times(self, times: JumpTimes) -> None:
        """Only the grid of its own levels will do."""
        if times != self.times:
            raise ValueError(
                f"Shortcut(levels={self.levels}) is trained on {self.times!r}, got {times!r}: leave it out"
            )

    def residual(self, u: AverageVelocity, batch: JumpBatch, predicted: tuple[Tensor, ...]) -> Tensor:
        """The difference of one jump and two of half its length, over the length."""
        with torch.no_grad():
            half = batch.length / 2
            middle = batch.start + half
            smallest = batch.length < 1.5 * 2.0**-self.levels
            # Halves of the shortest jump are not on the grid: they follow the velocity where they start.
            first = u(batch.x, batch.start, torch.where(smallest, batch.start, middle))
            between = batch.x + spread(half, batch.x) * first
            target = (first + u(between, middle, torch.where(smallest, middle, batch.end))) / 2
        return predicted[0] - target

    def extra_repr(self) -> str:
        """See :meth:`FlowMapObjective.extra_repr`."""
        return ", ".join(filter(None, (f"levels={self.levels}", super().extra_repr())))
