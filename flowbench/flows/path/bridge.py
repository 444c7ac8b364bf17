"""Brownian bridges between source and data."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.checks import check_number, check_scale
from flowbench.flows.path.base import Path, PathCoefficients

__all__ = ["SchrodingerBridgePath"]


class SchrodingerBridgePath(Path):
    """Brownian bridges ``x_t = t x1 + (1 - t) x0 + sigma sqrt(t (1 - t)) noise``.

    With the velocity ``(1 - 2t) / (2t (1 - t)) (x_t - mu_t) + x1 - x0``, mu_t the mean of x_t given both ends. The
    marginals are those of the Schroedinger bridge only if the pairs come from the *entropic* plan whose regularisation
    is ``2 sigma^2`` on squared distances in data units (:class:`~flowbench.flows.SinkhornCoupling`); an exact coupling
    gives optimal transport with noise along the way. sigma = 0 would be OT-CFM: use
    :class:`~flowbench.flows.LinearPath`.

    The variance of the velocity behaves like 1/t and 1/(1 - t) at the ends and its mean square over all times is
    infinite, hence ``clip``. What ``clip`` leaves out at the start, noise of variance sigma^2 clip, is neglected. There
    are no conversions: x_t and one prediction do not determine data, source and noise.

    Args:
        sigma: diffusion of the bridge, in [1e-12, 1e12], in data units: on standardised data 1 is as large as the data.
        clip: distance of ``interval`` from 0 and from 1, in [1e-6, 0.5): float32 times come no closer to 1.

    References:
        Tong et al. 2023, arXiv 2302.00482 (SB-CFM).

    Example:
        >>> path = SchrodingerBridgePath(sigma=1.0)
        >>> path.noise_scale(torch.tensor([0.0, 0.5, 1.0]))[0]  # pinned at both ends
        tensor([0.0000, 0.5000, 0.0000])
        >>> x0, x1, rng = torch.zeros(4, 2), torch.ones(4, 2), torch.Generator().manual_seed(0)
        >>> sample = path.sample(x0, x1, torch.full((4,), 0.5), rng)
        >>> torch.allclose(sample.xt, 0.5 + 0.5 * sample.noise)
        True
    """

    needs_generator = True

    def __init__(self, sigma: float, clip: float = 1e-3) -> None:
        check_scale("sigma", sigma, hint="sigma = 0 is OT-CFM, use LinearPath")
        check_number("clip", clip, at_least=1e-6, below=0.5, hint="the velocity is infinite at t = 0 and t = 1")
        self.sigma = sigma
        self.clip = clip
        self.interval = (clip, 1 - clip)

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients (t, 1 - t) of the mean."""
        one = torch.ones_like(t)
        return PathCoefficients(t, 1 - t, one, -one)

    def noise_scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``sigma sqrt(t (1 - t))`` and its derivative, infinite at t = 0 and t = 1."""
        root = (t * (1 - t)).sqrt()
        return self.sigma * root, self.sigma * (1 - 2 * t) / (2 * root)

    def __repr__(self) -> str:
        return f"SchrodingerBridgePath(sigma={self.sigma:g}, clip={self.clip:g})"
