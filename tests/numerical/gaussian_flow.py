"""The closed-form flow between isotropic Gaussians with an independent coupling: the oracle of several tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.flows.path.base import Path


@dataclass(frozen=True)
class GaussianFlow:
    """From N(0, a^2 I) to N(m, b^2 I) along a path; every point of the path is Gaussian.

    ``cross`` is the covariance of source and data in each coordinate (0: independent).
    """

    path: Path
    a: float
    b: float
    m: Tensor
    cross: float = 0.0

    def variance_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance of a coordinate of x_t and half its time derivative, the covariance of x_t and its velocity."""
        c = self.path.coefficients(t)
        gamma, d_gamma = self.path.noise_scale(t)
        a2, b2, cross = self.a**2, self.b**2, self.cross
        variance = c.alpha**2 * b2 + c.sigma**2 * a2 + 2 * c.alpha * c.sigma * cross + gamma**2
        mixed = (c.alpha * c.d_sigma + c.sigma * c.d_alpha) * cross
        # At an end where sigma vanishes like a root, sigma sigma' is finite although sigma' is not.
        return variance, c.alpha * c.d_alpha * b2 + c.sigma * c.d_sigma * a2 + mixed + gamma * d_gamma

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The marginal velocity, E[velocity | x_t]."""
        c = self.path.coefficients(t)
        variance, rate = self.variance_and_rate(t)
        return c.d_alpha * self.m + rate / variance * (x - c.alpha * self.m)

    def score(self, t: Tensor, x: Tensor) -> Tensor:
        """Gradient of the log-density of x_t."""
        return -(x - self.path.coefficients(t).alpha * self.m) / self.variance_and_rate(t)[0]

    def noise(self, num: int, seed: int = 0) -> Tensor:
        """Source points, float64."""
        rng = torch.Generator().manual_seed(seed)
        return self.a * torch.randn(num, len(self.m), generator=rng, dtype=torch.float64)
