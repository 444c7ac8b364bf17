"""Flow maps in closed form: of Gaussians, and of mixtures in one dimension, whose maps are monotone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.flows.flow_map.derivative import spread

GOLDEN = {
    # (s, t, x): X(x, s, t), u, b(x, s), b(X, t); N(0, 1) to N(2, 0.5^2)
    (0.0, 1.0, 0.3): (2.150000, 1.850000, 1.700000, 2.150000),
    (0.2, 0.7, -0.4): (0.942583, 2.685165, 2.923077, 2.269069),
    (0.25, 1.0, 0.0): (1.671202, 2.228269, 2.594595, 1.671202),
    (0.9, 0.1, 1.7): (0.004462, 2.119423, 1.941176, 2.210580),
}
GOLDEN_MIXTURE = {
    # (s, t, x): X(x, s, t), b(x, s); N(0, 1) to 0.3 N(-2, 0.4^2) + 0.7 N(1.5, 0.6^2)
    (0.0, 1.0, 0.3): (1.430904, 0.150000),
    (0.0, 1.0, -1.0): (-1.971047, 1.450000),
    (0.2, 0.7, -0.4): (-0.722421, 0.629777),
    (0.9, 0.1, 1.7): (0.871816, 1.759947),
}
# log |dX/dx| at the same (s, t, x).
LOG_DETERMINANTS = (-0.693147, -0.559015, -0.419165, 0.670587)
LOG_DETERMINANTS_MIXTURE = (-0.192520, -0.209698, 1.624397, 0.357690)


@dataclass(frozen=True)
class GaussianMap:
    """Average velocities of the flow from N(0, I) to N(mean, std^2 I) on the line, independent pairs; smooth at s = t.

    x_t is N(t mean, S_t^2), S_t^2 = (1 - t)^2 + t^2 std^2, and X = t mean + (S_t / S_s) (x - s mean).
    """

    mean: float = 2.0
    std: float = 0.5

    def deviation(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 + (t * self.std) ** 2).sqrt()

    def __call__(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        s, t = spread(s, x), spread(t, x)
        first, last = self.deviation(s), self.deviation(t)
        rate = ((1 + self.std**2) * (t + s) - 2) / (last + first)  # (S_t - S_s) / (t - s)
        return self.mean + rate / first * (x - s * self.mean)

    def divergence(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """log(S_t / S_s) / (t - s), per dimension, shape (B,); the same for all x."""
        same = s == t
        slope = (t * self.std**2 - (1 - t)) / self.deviation(t) ** 2
        return torch.where(same, slope, (self.deviation(t) / self.deviation(s)).log() / torch.where(same, 1.0, t - s))

    def joint(self, x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, s, t), self.divergence(x, s, t)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x1 - x0 | x_t = x]."""
        t = spread(t, x)
        return self.mean + (t * self.std**2 - (1 - t)) / self.deviation(t) ** 2 * (x - t * self.mean)

    def draw_velocity(self, x: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
        """Draws of x1 - x0 given x_t = x; times below 1."""
        t = spread(t, x)
        gain = t * self.std**2 / self.deviation(t) ** 2
        spread_of_data = (self.std**2 - gain * t * self.std**2).sqrt()
        noise = torch.randn(x.shape, generator=rng, dtype=x.dtype)
        data = self.mean + gain * (x - t * self.mean) + spread_of_data * noise
        return data - (x - t * data) / (1 - t)


@dataclass(frozen=True)
class MixtureMap:
    """The flow map from N(0, 1) to a mixture in one dimension: quantiles are carried to quantiles, by bisection."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-2.0, 1.5)
    stds: tuple[float, ...] = (0.4, 0.6)

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised positions, weights and deviations in each component, shape (B, 1, K)."""
        t = t.view(-1, 1, 1)
        weights, means, stds = (torch.tensor(v, dtype=x.dtype) for v in (self.weights, self.means, self.stds))
        deviations = ((1 - t) ** 2 + (t * stds) ** 2).sqrt()
        return (x[..., None] - t * means) / deviations, weights, deviations

    def share(self, x: Tensor, t: Tensor) -> Tensor:
        """The distribution function of x_t."""
        z, weights, _ = self._parts(x, t)
        return (weights * 0.5 * torch.erfc(-z / math.sqrt(2))).sum(-1)

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """Log-density of x_t, shape (B, 1)."""
        z, weights, deviations = self._parts(x, t)
        return (weights.log() - z.square() / 2 - deviations.log()).logsumexp(-1) - math.log(2 * math.pi) / 2

    def divergence(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Average divergence along the path, shape (B,); s != t."""
        change = self.log_prob(x, s) - self.log_prob(self.carried(x, s, t), t)
        return change.squeeze(1) / (t - s)

    def joint(self, x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, s, t), self.divergence(x, s, t)

    def carried(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """X(x, s, t), shape (B, 1)."""
        share, low, high = self.share(x, s), torch.full_like(x, -30.0), torch.full_like(x, 30.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.share(middle, t) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def __call__(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        length = spread(t - s, x)
        jump = (self.carried(x, s, t) - x) / torch.where(length == 0, 1.0, length)
        return torch.where(length == 0, self.velocity(x, s), jump)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x1 - x0 | x_t = x], shape (B, 1)."""
        z, weights, deviations = self._parts(x, t)
        posterior = (weights.log() - z.square() / 2 - deviations.log()).softmax(-1)
        t = t.view(-1, 1, 1)
        means, stds = (torch.tensor(v, dtype=x.dtype) for v in (self.means, self.stds))
        parts = means + (t * stds**2 - (1 - t)) / deviations * z
        return (posterior * parts).sum(-1)
