"""A flow whose conditionals and posteriors are known in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from flowbench.data import DataSpec
from flowbench.families import FlowModule, FlowSamples

IMAGE = DataSpec("image", "1", (1, 4, 4), num_classes=3)


class GaussianFlow(FlowModule):
    """x = mean_k + L_k z in raster order, L_k lower triangular: one autoregressive block in closed form.

    Label None, and the null label, are class 0's.
    """

    density = "exact"

    def __init__(self, spec: DataSpec = IMAGE, *, conditional: bool = False, order: int = 1, **options) -> None:
        super().__init__(spec, conditional=conditional, **options)
        rng = np.random.default_rng(0)
        dims, count = spec.num_dims, spec.num_classes
        self.order = order
        self.mean = torch.tensor(rng.normal(size=(count, dims)))
        lower = np.tril(rng.normal(size=(count, dims, dims)) * 0.4, -1)
        lower += rng.uniform(0.5, 1.5, size=(count, dims))[:, :, None] * np.eye(dims)
        self.lower = torch.tensor(lower)
        self.dummy = nn.Parameter(torch.zeros(()))

    def _of(self, condition, num):
        label = condition.label
        k = torch.zeros(num, dtype=torch.long) if label is None else label % self.spec.num_classes
        return self.mean[k], self.lower[k]

    def flow_encode(self, z, condition):
        mean, lower = self._of(condition, len(z))
        flat = (z.flatten(1) - mean).flip(1) if self.order < 0 else z.flatten(1) - mean
        noise = torch.linalg.solve_triangular(lower.to(flat), flat.unsqueeze(-1), upper=False).squeeze(-1)
        return (noise.flip(1) if self.order < 0 else noise).view_as(z)

    def flow_sample(self, noise, condition, override):
        mean, lower = self._of(condition, len(noise))
        flat = noise.flatten(1).flip(1) if self.order < 0 else noise.flatten(1)
        moved = (lower.to(flat) @ flat.unsqueeze(-1)).squeeze(-1)
        x = (moved.flip(1) if self.order < 0 else moved) + mean.to(flat)
        return FlowSamples(x.view_as(noise), network_evaluations=1.0)

    def flow_log_prob(self, x, condition, index, seed):
        _, lower = self._of(condition, len(x))
        logdet = lower.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.source.log_prob(self.flow_encode(x, condition)) - logdet

    def loss(self, points, condition, batch, generator):
        raise AssertionError("not trained")

    def trajectory(self, noise, condition=None, num_points=33):
        raise AssertionError("not drawn")


def data(spec: DataSpec = IMAGE, num: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, *spec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
