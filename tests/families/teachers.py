"""Teachers whose maps are known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowbench.data import DataSpec
from flowbench.families import FlowMatching
from flowbench.flows import RungeKutta4

PLANE = DataSpec("plane", "1", (2,))
LABELLED = DataSpec("plane", "1", (2,), num_classes=2)
MEAN, STD = 3.0, 0.5


class GaussianField(nn.Module):
    """Velocities from N(0, I) to N(mean, std^2 I), along the independent or the optimal pairs.

    Independent pairs: v = mean + (t std^2 - (1 - t)) / ((1 - t)^2 + t^2 std^2) (x - t mean); the paths bend. Optimal
    ones: v = mean + (std - 1) x_0 with x_0 = (x - t mean) / (1 - t + t std). Both carry z to mean + std z. A label y
    moves the mean by y, the null label (2) by nothing.
    """

    def __init__(self, optimal: bool = True) -> None:
        super().__init__()
        self.optimal = optimal
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shift = 0.0 if label is None else (label % 2).to(x).view(-1, 1)
        mean, t = MEAN + shift, t.view(-1, 1)
        if self.optimal:
            return mean + (STD - 1) * (x - t * mean) / (1 - t + t * STD) + 0 * self.unused
        rate = (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * STD**2)
        return mean + rate * (x - t * mean) + 0 * self.unused


def gaussian_teacher(spec: DataSpec = PLANE, *, optimal: bool = True, **options) -> FlowMatching:
    """A flow to N(3, 0.5^2 I) whose every number is known; its solver's error lies below 1e-6."""
    return FlowMatching(spec, lambda *_: GaussianField(optimal), solver=RungeKutta4(num_steps=24), **options).eval()
