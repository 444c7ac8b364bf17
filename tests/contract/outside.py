"""A family that somebody wrote outside of flowbench: a learned shift of points, the whole contract and no more."""

from __future__ import annotations

import torch
from torch import nn

from flowbench.families import FlowModule, FlowSamples, Trajectory
from flowbench.training import Loss, TrainingConfig


class Shift(FlowModule):
    """What is left when every part of the contract is taken out."""

    def __init__(self, spec, *, conditional: bool = False, training: TrainingConfig | None = None) -> None:
        super().__init__(spec, conditional=conditional, training=training)
        self.shift = nn.Parameter(torch.full(self.flow_shape, 0.1))


PARTS = {
    "density": "exact",
    "loss": lambda self, points, condition, batch, generator: Loss(
        -self.flow_log_prob(points, condition, None, 0).float().mean()
    ),
    "flow_sample": lambda self, noise, condition, override: FlowSamples(noise + self.shift, 1.0),
    "flow_encode": lambda self, z, condition: z - self.shift,
    "flow_log_prob": lambda self, x, condition, index, seed: self.source.log_prob(x - self.shift),
    "trajectory": lambda self, noise, condition=None, num_points=33: Trajectory(
        torch.stack([noise, noise + self.shift]).detach(), torch.linspace(0.0, 1.0, 2)
    ),
}


def outside(**parts) -> type[FlowModule]:
    """The family with some parts replaced; None leaves one out."""
    found = {key: value for key, value in {**PARTS, **parts}.items() if value is not None}
    return type("Mine", (Shift,), {"__module__": __name__, **found})
