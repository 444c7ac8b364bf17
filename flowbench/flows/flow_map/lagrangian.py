"""The Lagrangian objective: the end of a jump moves with the velocity there."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.flows.flow_map.base import DifferentiatedObjective, JumpBatch
from flowbench.flows.flow_map.derivative import (
    STEP,
    AverageVelocity,
    Derivative,
    forward_derivative,
    spread,
)

__all__ = ["Lagrangian"]


class Lagrangian(DifferentiatedObjective):
    """Lagrangian self-distillation (LSD): ``d_t X(x, s, t) = b(X, t)``.

    The residual ``d_t X(x, s, t) - u(X, t, t)``; its gradient flows through the derivative, and neither through X nor
    through the velocity there, which is a teacher's where there is one. By differences it is a second evaluation with a
    gradient instead of a derivative through the network.

    Args:
        derivative: `difference`, of two jumps whose ends are 0.002 apart, or `jvp`, exact and about twice as expensive.
        weight_power: see :class:`FlowMapObjective`.

    Raises:
        ValueError: for another derivative or a number out of range.

    References:
        Boffi, Albergo and Vanden-Eijnden 2025, arXiv 2505.18825.

    Example:
        >>> batch = JumpBatch(torch.ones(1, 1), torch.tensor([0.0]), torch.tensor([0.5]), torch.zeros(1, 1))
        >>> shrink = lambda x, s, t: -x if bool((s == t).all()) else x * ((s - t).exp() - 1) / (t - s)[:, None]
        >>> bool(Lagrangian(derivative="jvp").residual(shrink, batch, ()).abs() < 1e-6)  # the map of dx/dt = -x
        True
    """

    needs_velocity = False

    def __init__(self, derivative: Derivative = "difference", weight_power: float = 0.0) -> None:
        super().__init__(derivative, weight_power)

    def ends(self, batch: JumpBatch) -> tuple[Tensor, ...]:
        """For differences, two ends beside t, where there is room on both sides."""
        if self.derivative == "jvp":
            return ()
        return torch.maximum(batch.end - STEP, batch.start), (batch.end + STEP).clamp(max=1)

    def residual(self, u: AverageVelocity, batch: JumpBatch, predicted: tuple[Tensor, ...]) -> Tensor:
        """The velocity of the end, less the velocity there."""
        if self.derivative == "jvp":
            end, arrived, moving = batch.end, *self._differentiated(u, batch)
        else:
            ends = self.ends(batch)
            low, high = (
                batch.x + spread(t - batch.start, batch.x) * found for t, found in zip(ends, predicted, strict=True)
            )
            moving = (high - low) / spread(ends[1] - ends[0], batch.x)
            # Between the two the map is their mean, up to the square of the step.
            end, arrived = (ends[0] + ends[1]) / 2, ((low + high) / 2).detach()
        with torch.no_grad():
            there = u(arrived, end, end) if batch.teacher is None else batch.teacher(end, arrived)
        return moving - there

    def _differentiated(self, u: AverageVelocity, batch: JumpBatch) -> tuple[Tensor, Tensor]:
        def jump(t: Tensor) -> Tensor:
            return batch.x + spread(t - batch.start, batch.x) * u(batch.x, batch.start, t)

        arrived, moving = forward_derivative(jump, (batch.end,), (torch.ones_like(batch.end),))
        return arrived.detach(), moving
