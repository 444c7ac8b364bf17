"""MeanFlow: the average velocity from the velocity at its start and a derivative of itself."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flowbench.flows.flow_map.base import TO_DATA, DifferentiatedObjective, JumpBatch
from flowbench.flows.flow_map.derivative import AverageVelocity, Derivative, spread, total_derivative

__all__ = ["MeanFlow"]

Tangent = Literal["data", "self"]


class MeanFlow(DifferentiatedObjective):
    """MeanFlow: ``u(x, s, t) = v + (t - s) (d_s u + (d_x u) w)``, the right side without gradient.

    v is the velocity of the pair and w the direction of the derivative: v again (`data`, the original), or the
    network's own velocity u(x, s, s) (`self`, the improved form, whose target varies less). Both are unbiased; without
    the stopped gradient they were not. The target has the end of the jump, so :class:`JumpsToData` will do.

    Args:
        tangent: `data` or `self`.
        derivative: `jvp`, about six evaluations, or `difference`, two, which any network and sharded weights can do.
        weight_power: see :class:`FlowMapObjective`; published recipes take 0.75 to 1 for images.

    Raises:
        ValueError: for another choice or a number out of range.

    References:
        Geng et al. 2025, arXiv 2505.13447 (in our direction of time the sign is plus); improved MeanFlow, 2025, arXiv
        2512.02012.

    Example:
        >>> batch = JumpBatch(torch.ones(1, 1), torch.tensor([0.0]), torch.tensor([1.0]), -torch.ones(1, 1))
        >>> shrink = lambda x, s, t: x * ((s - t).exp() - 1)[:, None] / (t - s)[:, None]  # the map of dx/dt = -x
        >>> objective = MeanFlow(tangent="data", derivative="jvp")
        >>> bool(objective.residual(shrink, batch, (shrink(batch.x, batch.start, batch.end),)).abs() < 1e-6)
        True
    """

    needed_jump = TO_DATA

    def __init__(self, tangent: Tangent = "data", derivative: Derivative = "jvp", weight_power: float = 0.0) -> None:
        super().__init__(derivative, weight_power)
        if tangent not in get_args(Tangent):
            raise ValueError(f"tangent must be one of {', '.join(get_args(Tangent))}, got {tangent!r}")
        self.tangent = tangent

    def residual(self, u: AverageVelocity, batch: JumpBatch, predicted: tuple[Tensor, ...]) -> Tensor:
        """The prediction, less what it should be."""
        with torch.no_grad():
            own = self.tangent == "self"
            direction = u(batch.x, batch.start, batch.start).to(batch.x) if own else batch.velocity
            change = total_derivative(u, batch.x, batch.start, batch.end, direction, self.derivative)
            target = batch.velocity + spread(batch.length, batch.x) * change
        return predicted[0] - target

    def extra_repr(self) -> str:
        """See :meth:`FlowMapObjective.extra_repr`."""
        return f"tangent={self.tangent}, {super().extra_repr()}"
