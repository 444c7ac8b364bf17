"""Probability paths: how a source point becomes a data point, and at which velocity.

Every path here is affine and Gaussian-compatible: ``x_t = alpha(t) x1 + sigma(t) x0`` with the target
velocity ``d_alpha(t) x1 + d_sigma(t) x0`` (Lipman et al. 2023, arXiv 2210.02747; Albergo and Vanden-Eijnden
2023, arXiv 2209.15571). Time runs 0 = source, 1 = data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CosinePath",
    "LinearPath",
    "Path",
    "PathCoefficients",
    "PathSample",
    "VariancePreservingPath",
]


@dataclass(frozen=True)
class PathCoefficients:
    """Coefficients of an affine path and their time derivatives, all of the shape of their time."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class PathSample:
    """Points on the path between paired source and data points.

    Attributes:
        x0: source points, shape (B, *D).
        x1: data points, shape (B, *D).
        t: times in [0, 1], shape (B,).
        xt: points of the path at time t, shape (B, *D).
        velocity: time derivative of the path at t, the regression target, shape (B, *D).
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    xt: Tensor
    velocity: Tensor


class Path(ABC):
    """An affine path ``x_t = alpha(t) x1 + sigma(t) x0``.

    A network may predict the velocity, the data point or the source point; the six conversions turn one into
    another at a known (x_t, t). They take t of shape (B,) or a scalar.

    Attributes:
        interval: times between which the velocity is finite; train and integrate inside it.
    """

    interval: tuple[float, float] = (0.0, 1.0)

    @abstractmethod
    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times t in [0, 1], of any shape."""

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
        """Points of the path and their target velocities.

        Args:
            x0: source points, shape (B, *D).
            x1: data points, shape (B, *D).
            t: times in [0, 1], shape (B,).

        Raises:
            ValueError: if the shapes disagree.
        """
        if x0.shape != x1.shape:
            raise ValueError(
                f"x0 and x1 must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}: pair them first"
            )
        if t.shape != x1.shape[:1]:
            raise ValueError(f"t must have shape ({len(x1)},), one time per sample, got {tuple(t.shape)}")
        c = self._coefficients_like(x1, t)
        return PathSample(x0, x1, t, c.alpha * x1 + c.sigma * x0, c.d_alpha * x1 + c.d_sigma * x0)

    def velocity_to_data(self, velocity: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Data point that a velocity at (x_t, t) points to; singular where the velocity is not finite."""
        c = self._coefficients_like(xt, t)
        determinant = self._divisor(c.alpha * c.d_sigma - c.sigma * c.d_alpha, t, "velocity to data")
        return (c.d_sigma * xt - c.sigma * velocity) / determinant

    def velocity_to_source(self, velocity: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Source point that a velocity at (x_t, t) comes from; singular where the velocity is not finite."""
        c = self._coefficients_like(xt, t)
        determinant = self._divisor(c.alpha * c.d_sigma - c.sigma * c.d_alpha, t, "velocity to source")
        return (c.alpha * velocity - c.d_alpha * xt) / determinant

    def data_to_velocity(self, data: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Velocity at (x_t, t) of the path that ends in ``data``; singular at t = 1, where sigma = 0."""
        c = self._coefficients_like(xt, t)
        return c.d_alpha * data + c.d_sigma * self.data_to_source(data, xt, t)

    def source_to_velocity(self, source: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Velocity at (x_t, t) of the path that starts in ``source``; singular where alpha = 0."""
        c = self._coefficients_like(xt, t)
        return c.d_alpha * self.source_to_data(source, xt, t) + c.d_sigma * source

    def data_to_source(self, data: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Source point of the path through (x_t, t) that ends in ``data``; singular at t = 1 (sigma = 0)."""
        c = self._coefficients_like(xt, t)
        return (xt - c.alpha * data) / self._divisor(c.sigma, t, "data to source or velocity")

    def source_to_data(self, source: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Data point of the path through (x_t, t) that starts in ``source``; singular where alpha = 0."""
        c = self._coefficients_like(xt, t)
        return (xt - c.sigma * source) / self._divisor(c.alpha, t, "source to data or velocity")

    def _coefficients_like(self, x: Tensor, t: Tensor) -> PathCoefficients:
        return self.coefficients(t.reshape(t.shape + (1,) * (x.ndim - t.ndim)))

    def _divisor(self, divisor: Tensor, t: Tensor, conversion: str) -> Tensor:
        singular = (divisor == 0) | ~divisor.isfinite()
        if singular.any():
            time = t.expand(divisor.shape[: t.ndim])[singular.reshape(t.shape)].flatten()[0].item()
            raise ValueError(
                f"{self!r} cannot turn {conversion} at t = {time:g}: the path is singular there;"
                f" stay strictly inside {self.interval}"
            )
        return divisor

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LinearPath(Path):
    """Straight lines at constant speed, ``x_t = t x1 + (1 - t) x0``.

    Conversions from the velocity are regular at every t; from the data they are singular at t = 1, from the
    source at t = 0.

    References:
        Lipman et al. 2023, arXiv 2210.02747; Liu, Gong and Liu 2022, arXiv 2209.03003 (rectified flow).
    """

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients (t, 1 - t)."""
        one = torch.ones_like(t)
        return PathCoefficients(t, 1 - t, one, -one)


class CosinePath(Path):
    """Quarter circle ``x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0``.

    Keeps unit variance for standardised data under an independent coupling. Conversions from the velocity are
    regular at every t; from the data they are singular at t = 1, from the source at t = 0.

    References:
        Albergo and Vanden-Eijnden 2023, arXiv 2209.15571, the trigonometric interpolant.
    """

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients (sin, cos) of pi t / 2."""
        rate = math.pi / 2
        # cos(pi / 2) is not 0 in floating point; sin of the remaining time is, so that x_1 is the data point
        # exactly.
        alpha, sigma = torch.sin(rate * t), torch.sin(rate * (1 - t))
        return PathCoefficients(alpha, sigma, rate * sigma, -rate * alpha)


class VariancePreservingPath(Path):
    """The variance-preserving diffusion with a linear noise rate, run from noise (t = 0) to data (t = 1).

    With r = 1 - t, ``alpha = exp(-(beta_max - beta_min) r^2 / 4 - beta_min r / 2)`` and ``sigma^2 = 1 -
    alpha^2``. alpha(0) is small but not zero (0.0066 for the default rates), so x_0 keeps a trace of the data
    and the source is matched only approximately. The velocity grows without bound as t -> 1, where sigma
    vanishes like a square root: ``interval`` ends just before, and conversions at t = 1 are refused.

    Args:
        beta_min: noise rate at the data end, > 0.
        beta_max: noise rate at the source end, >= beta_min.

    References:
        Song et al. 2021, arXiv 2011.13456, appendix C.
    """

    interval = (0.0, 1.0 - 1e-5)

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got beta_min={beta_min} and beta_max={beta_max}")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients of the diffusion; d_sigma is -inf at t = 1."""
        rest = 1 - t
        slope = self.beta_max - self.beta_min
        log_alpha = -(slope * rest / 4 + self.beta_min / 2) * rest
        alpha = log_alpha.exp()
        # expm1 keeps sigma accurate next to the data, where alpha rounds to 1.
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = alpha * (slope * rest + self.beta_min) / 2
        return PathCoefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def __repr__(self) -> str:
        return f"VariancePreservingPath(beta_min={self.beta_min:g}, beta_max={self.beta_max:g})"
