"""The variance-preserving diffusion as a path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowbench.core.checks import check_scale
from flowbench.flows.path.base import Path, PathCoefficients

__all__ = ["VariancePreservingPath"]


class VariancePreservingPath(Path):
    """The variance-preserving diffusion with a linear noise rate, run from noise (t = 0) to data (t = 1).

    With r = 1 - t, ``alpha = exp(-(beta_max - beta_min) r^2 / 4 - beta_min r / 2)`` and ``sigma^2 = 1 -
    alpha^2``. alpha(0) is small but not zero (0.0066 for the default rates), so x_0 keeps a trace of the data
    and the source is matched only approximately. The velocity grows without bound as t -> 1, where sigma
    vanishes like a square root: ``interval`` ends just before, and conversions at t = 1 are refused.

    Args:
        beta_min: noise rate at the data end, in [1e-12, 1e12].
        beta_max: noise rate at the source end, in [beta_min, 1e12].

    References:
        Song et al. 2021, arXiv 2011.13456, appendix C.

    Example:
        >>> path = VariancePreservingPath()
        >>> c = path.coefficients(torch.tensor([0.0, 0.5, 1.0]))
        >>> c.alpha, c.sigma  # alpha^2 + sigma^2 = 1
        (tensor([0.0066, 0.2812, 1.0000]), tensor([1.0000, 0.9597, 0.0000]))
    """

    interval = (0.0, 1.0 - 1e-5)

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        check_scale("beta_min", beta_min)
        check_scale("beta_max", beta_max)
        if beta_min > beta_max:
            raise ValueError(f"need beta_min <= beta_max, got beta_min={beta_min} and beta_max={beta_max}")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients of the diffusion; d_sigma is -inf at t = 1."""
        rest = 1 - t
        slope = self.beta_max - self.beta_min
        log_alpha = self._log_alpha(t)
        alpha = log_alpha.exp()
        # expm1 keeps sigma accurate next to the data, where alpha rounds to 1.
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = alpha * (slope * rest + self.beta_min) / 2
        return PathCoefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def _log_alpha(self, t: Tensor) -> Tensor:
        rest = 1 - t
        slope = self.beta_max - self.beta_min
        return -(slope * rest / 4 + self.beta_min / 2) * rest

    def _log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self._log_alpha(t)
        return log_alpha - (-torch.expm1(2 * log_alpha)).log() / 2

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma^2 = 1 - alpha^2 makes alpha^2 the sigmoid of 2 lambda; -log(alpha) is a quadratic in the rest 1 - t,
        # solved in the form that neither cancels nor divides by a slope of zero.
        minus_log_alpha = F.softplus(-2 * log_snr, threshold=50) / 2
        half = self.beta_min / 2
        slope = self.beta_max - self.beta_min
        return 1 - 2 * minus_log_alpha / (half + (half**2 + slope * minus_log_alpha).sqrt())

    def __repr__(self) -> str:
        return f"VariancePreservingPath(beta_min={self.beta_min:g}, beta_max={self.beta_max:g})"
