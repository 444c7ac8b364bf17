"""Paths of straight lines and quarter circles between source and data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowbench.core.checks import check_number
from flowbench.flows.path.base import Path, PathCoefficients

__all__ = ["CosinePath", "LinearPath", "TargetConditionalPath"]


class LinearPath(Path):
    """Straight lines at constant speed, ``x_t = t x1 + (1 - t) x0``, plus ``sigma`` times a standard normal.

    Conversions from the velocity are regular at every t; from the data they are singular at t = 1, from the
    source at t = 0. With sigma > 0 there are none, and both ends are smoothed: the flow carries source * N(0, sigma^2)
    to data * N(0, sigma^2), so that its samples are *blurred* data. The velocity stays x1 - x0.

    Args:
        sigma: constant standard deviation around the line, in [0, 1e12], in data units.

    References:
        Lipman et al. 2023, arXiv 2210.02747; Liu, Gong and Liu 2022, arXiv 2209.03003 (rectified flow); Tong et al.
        2023, arXiv 2302.00482 (sigma).

    Example:
        >>> path = LinearPath()
        >>> sample = path.sample(x0=torch.tensor([[1.0]]), x1=torch.tensor([[5.0]]), t=torch.tensor([0.5]))
        >>> sample.xt, sample.velocity
        (tensor([[3.]]), tensor([[4.]]))
        >>> path.velocity_to_data(sample.velocity, sample.xt, sample.t)
        tensor([[5.]])
    """

    def __init__(self, sigma: float = 0.0) -> None:
        check_number("sigma", sigma, at_least=0, hint="it is a standard deviation in data units")
        self.sigma = sigma
        self.needs_generator = sigma > 0

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients (t, 1 - t)."""
        one = torch.ones_like(t)
        return PathCoefficients(t, 1 - t, one, -one)

    def noise_scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The constant sigma, and 0."""
        return torch.full_like(t, self.sigma), torch.zeros_like(t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return t.logit()

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return log_snr.sigmoid()

    def __repr__(self) -> str:
        return f"LinearPath(sigma={self.sigma:g})" if self.sigma else "LinearPath()"


class TargetConditionalPath(Path):
    """Lipman's conditional path of one data point, ``x_t ~ N(t x1, (1 - (1 - sigma_min) t)^2 I)``.

    Drawn with the source point as its noise, ``x_t = t x1 + (1 - (1 - sigma_min) t) x0``, so that it is right only for
    a standard normal source and an independent coupling. The flow ends in data * N(0, sigma_min^2). With sigma_min = 0
    it is the straight line.

    Args:
        sigma_min: standard deviation left at the data end, in [0, 1), in data units.

    References:
        Lipman et al. 2023, arXiv 2210.02747, equations 20 to 23.

    Example:
        >>> path = TargetConditionalPath(sigma_min=0.1)
        >>> x0, x1 = torch.tensor([[1.0]]), torch.tensor([[5.0]])
        >>> path.sample(x0, x1, t=torch.tensor([1.0])).xt  # x1 + sigma_min x0
        tensor([[5.1000]])
        >>> path.sample(x0, x1, t=torch.tensor([1.0])).velocity  # x1 - (1 - sigma_min) x0
        tensor([[4.1000]])
    """

    needs_standard_normal = True

    def __init__(self, sigma_min: float = 1e-4) -> None:
        check_number("sigma_min", sigma_min, at_least=0, below=1, hint="it is what is left of the unit source")
        self.sigma_min = sigma_min

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients (t, 1 - (1 - sigma_min) t)."""
        decrease, one = 1 - self.sigma_min, torch.ones_like(t)
        return PathCoefficients(t, 1 - decrease * t, one, -decrease * one)

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return 1 / ((-log_snr).exp() + (1 - self.sigma_min))

    def __repr__(self) -> str:
        return f"TargetConditionalPath(sigma_min={self.sigma_min:g})"


class CosinePath(Path):
    """Quarter circle ``x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0``.

    Keeps unit variance for standardised data under an independent coupling. Curved and of varying speed even where the
    coupling is optimal. Conversions from the velocity are regular at every t; from the data they are singular at
    t = 1, from the source at t = 0.

    References:
        Albergo and Vanden-Eijnden 2023, arXiv 2209.15571, the trigonometric interpolant.

    Example:
        >>> sample = CosinePath().sample(x0=torch.zeros(1, 1), x1=torch.ones(1, 1), t=torch.tensor([0.5]))
        >>> sample.xt, sample.velocity  # sin(pi / 4), and pi / 2 times cos(pi / 4)
        (tensor([[0.7071]]), tensor([[1.1107]]))
    """

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients (sin, cos) of pi t / 2."""
        rate = math.pi / 2
        # cos(pi / 2) is not 0 in floating point; sin of the remaining time is, so that x_1 is the data point
        # exactly.
        alpha, sigma = torch.sin(rate * t), torch.sin(rate * (1 - t))
        return PathCoefficients(alpha, sigma, rate * sigma, -rate * alpha)

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return log_snr.exp().atan() / (math.pi / 2)
