"""Time grids: where a fixed-step solver puts its steps between the source (0) and the data (1)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowbench.core.checks import check_number, check_scale
from flowbench.flows.time import check_logit_mean

__all__ = ["CosineGrid", "EDMGrid", "LogitNormalGrid", "TimeGrid", "UniformGrid"]


class TimeGrid(ABC):
    """Step ends in the unit of the solve: 0 is its earliest time, 1 its latest, whichever way it runs.

    Example:
        >>> class QuadraticGrid(TimeGrid):
        ...     def points(self, num_steps):
        ...         return UniformGrid().points(num_steps) ** 2
        >>> Euler(num_steps=2, grid=QuadraticGrid()).stage_times(torch.tensor([0.0, 1.0]))
        [0.0, 0.25]
    """

    @abstractmethod
    def points(self, num_steps: int) -> Tensor:
        """Strictly increasing points from exactly 0 to exactly 1, float64, shape (num_steps + 1,)."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class UniformGrid(TimeGrid):
    """Steps of equal length.

    Example:
        >>> UniformGrid().points(4)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """

    def points(self, num_steps: int) -> Tensor:
        """The points i / num_steps."""
        return torch.arange(num_steps + 1, dtype=torch.float64) / num_steps


class EDMGrid(TimeGrid):
    """The noise levels of EDM, dense at the data end.

    Level i of N is ``(sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``, the last step
    leads to no noise. On the linear path ``x_t / t = x_1 + ((1 - t) / t) x_0``, so a level sigma lies at
    ``t = 1 / (1 + sigma)``; the first level is moved to t = 0 exactly. More steps divide the levels between
    ``sigma_max`` and ``sigma_min``, not the ways from t = 0 and to t = 1 beyond them: choose the two far out.

    Args:
        rho: how much shorter the steps at the data end are, in [0.1, 1e6]; 1 spaces the levels evenly, towards
            infinity their logarithms.
        sigma_min: lowest level before no noise, in [1e-12, 1e12].
        sigma_max: level of the first step, above sigma_min, at most 1e12.

    References:
        Karras et al. 2022, arXiv 2206.00364, equation 5 and table 1.

    Example:
        >>> EDMGrid(rho=1.0, sigma_min=1.0, sigma_max=3.0).points(3)  # noise levels 3, 2, 1, 0 at t = 1 / (1 + level)
        tensor([0.0000, 0.3333, 0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        check_number("rho", rho, at_least=0.1, at_most=1e6, hint="the paper's is 7")
        check_scale("sigma_min", sigma_min)
        check_scale("sigma_max", sigma_max)
        if sigma_min >= sigma_max:
            raise ValueError(f"need sigma_min < sigma_max, got sigma_min={sigma_min} and sigma_max={sigma_max}")
        self.rho = rho
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def points(self, num_steps: int) -> Tensor:
        """The levels as times of the linear path; a single step leads from 0 to 1."""
        last, first = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        levels = torch.linspace(first, last, num_steps, dtype=torch.float64) ** self.rho
        points = torch.cat([1 / (1 + levels), torch.ones(1, dtype=torch.float64)])
        points[0] = 0
        return points

    def __repr__(self) -> str:
        return f"EDMGrid(rho={self.rho:g}, sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g})"


class CosineGrid(TimeGrid):
    """The points ``(1 - cos(pi i / N)) / 2``, dense at both ends (the extrema of a Chebyshev polynomial).

    Example:
        >>> CosineGrid().points(4)
        tensor([0.0000, 0.1464, 0.5000, 0.8536, 1.0000], dtype=torch.float64)
    """

    def points(self, num_steps: int) -> Tensor:
        """The points, from the squared sine of half the angle, which is exact at both ends."""
        return torch.sin(UniformGrid().points(num_steps) * (math.pi / 2)).square()


class LogitNormalGrid(TimeGrid):
    """Quantiles of a logit-normal time: steps where training with such times looks most.

    Args:
        mean: mean of ``log(t / (1 - t))``, in [-20, 20]; above 0 the data end is denser.
        std: standard deviation of it, in [1e-12, 1e12]; below about 1.6 the middle is dense, above it the ends.

    References:
        Esser et al. 2024, arXiv 2403.03206, section 3.1, where times of training are drawn so.

    Example:
        >>> LogitNormalGrid().points(4)
        tensor([0.0000, 0.3375, 0.5000, 0.6625, 1.0000], dtype=torch.float64)
        >>> LogitNormalGrid(mean=1.0).points(4)  # denser at the data end
        tensor([0.0000, 0.5807, 0.7311, 0.8422, 1.0000], dtype=torch.float64)
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        check_logit_mean(mean)
        check_scale("std", std)
        self.mean = mean
        self.std = std

    def points(self, num_steps: int) -> Tensor:
        """The quantiles at i / num_steps."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(UniformGrid().points(num_steps)))

    def __repr__(self) -> str:
        return f"LogitNormalGrid(mean={self.mean:g}, std={self.std:g})"
