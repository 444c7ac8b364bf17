"""A package outside of flowbench: neural spline flows of zuko (Rozet et al., 2022) as a family of the bench."""

from __future__ import annotations

import torch
import zuko

from flowbench.data import DataSpec
from flowbench.families import FlowModule, FlowSamples, Trajectory
from flowbench.training import Loss, TrainingConfig


class SplineFlow(FlowModule):
    """Autoregressive neural spline flow (Durkan et al., 2019, arXiv 1906.04032) of vectors.

    Args:
        spec: the data's shape.
        transforms: autoregressive transformations.
        width: hidden features of each.
        training: optimiser and averaged weights.
    """

    density = "exact"

    def __init__(
        self, spec: DataSpec, *, transforms: int = 2, width: int = 32, training: TrainingConfig | None = None
    ) -> None:
        super().__init__(spec, training=training)
        self.flow = zuko.flows.NSF(spec.num_dims, transforms=transforms, hidden_features=(width, width))

    def loss(self, points, condition, batch, generator):
        return Loss(-self.flow().log_prob(points).mean())

    def flow_sample(self, noise, condition, override):
        return FlowSamples(self.flow().transform.inv(noise), network_evaluations=1.0)

    def flow_encode(self, z, condition):
        return self.flow().transform(z)

    def flow_log_prob(self, x, condition, index, seed):
        return self.flow().log_prob(x)

    def trajectory(self, noise, condition=None, num_points=33):
        with torch.no_grad():
            states = torch.stack([noise, self.flow().transform.inv(noise)])
        return Trajectory(states, torch.linspace(0.0, 1.0, 2, device=noise.device))
