"""Predictions of the velocity, the data point, the source point and the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowbench.flows.objective.base import Objective
from flowbench.flows.path.base import PathCoefficients, PathSample

__all__ = ["DataObjective", "NoiseObjective", "ScoreObjective", "VelocityObjective"]


class VelocityObjective(Objective):
    """The network predicts the velocity: conditional flow matching.

    The only prediction without a singular end, and the only one on a path with noise of its own.

    Args:
        weight: ``natural``, the squared error alike at all times, or ``elbo``: on the linear path t / (1 - t).
        clip: distance from an end within which the elbo weight stays constant, in (0, 0.5); None is 0.02 for that
            weight, and the natural one has nothing to clip.

    Raises:
        ValueError: for another weight, or a clip where there is nothing to clip.

    References:
        Lipman et al. 2023, arXiv 2210.02747, eq. 9; Salimans and Ho 2022, arXiv 2202.00512.

    Example:
        >>> point = LinearPath().sample(x0=torch.zeros(1, 2), x1=torch.ones(1, 2), t=torch.tensor([0.75]))
        >>> for weight in ("natural", "elbo"):
        ...     VelocityObjective(weight).for_path(LinearPath()).error(torch.zeros(1, 2), point)
        tensor([1.])
        tensor([3.])
    """

    prediction = "velocity"
    weights = ("natural", "elbo")

    def __init__(self, weight: Literal["natural", "elbo"] = "natural", clip: float | None = None) -> None:
        super().__init__(weight, 0.02 if clip is None else clip)
        if clip is not None and weight == "natural":
            raise ValueError(f"clip bounds the weight elbo, and the weight natural has no bound to keep: got {clip:g}")

    @property
    def needs_conversion(self) -> bool:
        """Only the elbo weight does."""
        return self.weight == "elbo"

    @property
    def sampler_name(self) -> str | None:
        """None: a velocity is integrated as it is."""
        return None

    def target(self, point: PathSample) -> Tensor:
        """The velocity of the path."""
        return point.velocity

    def _affine(self, c: PathCoefficients) -> tuple[Tensor, Tensor]:
        return torch.ones_like(c.alpha), torch.zeros_like(c.alpha)

    def clock(self, t: Tensor) -> Tensor:
        """All times."""
        return t

    def velocity(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The output."""
        return output

    def field(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The network."""
        return network

    def metrics(self, output: Tensor, point: PathSample) -> dict[str, Tensor]:
        """None where the loss is the velocity's error itself."""
        return {} if self.weight == "natural" else super().metrics(output, point)

    def __repr__(self) -> str:
        return "VelocityObjective()" if self.weight == "natural" else super().__repr__()


class DataObjective(Objective):
    """The network predicts the data point, the posterior mean E[x1 | x_t]: a denoiser.

    The velocity is ``alpha' x1 + sigma' (x_t - alpha x1) / sigma``; on the linear path (x1 - x_t) / (1 - t). Data that
    lie on a set of few dimensions are easier to predict than a velocity or noise, which fill the space.

    Args:
        weight: of the squared error of the data point: 1, or ``velocity``, on the linear path 1 / (1 - t)^2, or
            ``elbo``, on the linear path t / (1 - t)^3.
        clip: no evaluation is nearer to the data's end than this, in (0, 0.5).

    References:
        Li and He 2025, arXiv 2511.13720 (data prediction under the velocity's loss); Lai et al. 2025, arXiv 2510.21890.

    Example:
        >>> objective = DataObjective("velocity", clip=0.1).for_path(LinearPath())
        >>> objective.weight_at(torch.tensor([0.0, 0.5, 0.9, 1.0])).round(decimals=2)  # 1 / (1 - t)^2
        tensor([  1.,   4., 100., 100.])
    """

    prediction = "data"
    _clipped_ends = (False, True)

    def target(self, point: PathSample) -> Tensor:
        """The data point."""
        return point.x1

    def _affine(self, c: PathCoefficients) -> tuple[Tensor, Tensor]:
        return c.d_alpha - c.d_sigma * c.alpha / c.sigma, c.d_sigma / c.sigma


class NoiseObjective(Objective):
    """The network predicts the source point, E[x0 | x_t]: the noise of a Gaussian source.

    The velocity is ``alpha' (x_t - sigma x0) / alpha + sigma' x0``; on the linear path (x_t - x0) / t. Any source and
    any coupling will do: what is predicted is the source point of the pair.

    Args:
        weight: of the squared error of the source point: 1, or ``velocity``, on the linear path 1 / t^2, or ``elbo``,
            on the linear path 1 / (t (1 - t)), clipped at both ends.
        clip: no evaluation is nearer to the source's end than this, in (0, 0.5).

    References:
        Ho, Jain and Abbeel 2020, arXiv 2006.11239, eq. 14 (the natural weight, there called simple).

    Example:
        >>> objective = NoiseObjective().for_path(LinearPath())
        >>> objective.velocity(torch.zeros(1, 2), xt=torch.ones(1, 2), t=torch.tensor([0.5]))  # (x_t - 0) / t
        tensor([[2., 2.]])
    """

    prediction = "noise"
    _clipped_ends = (True, False)

    def target(self, point: PathSample) -> Tensor:
        """The source point."""
        return point.x0

    def _affine(self, c: PathCoefficients) -> tuple[Tensor, Tensor]:
        return c.d_sigma - c.d_alpha * c.sigma / c.alpha, c.d_alpha / c.alpha


class ScoreObjective(NoiseObjective):
    """The network predicts the score, the gradient of the log-density of x_t: denoising score matching.

    For a Gaussian source N(0, source_std^2 I) that is independent of the data the score is
    ``-E[x0 | x_t] / (sigma source_std^2)``. Its target is infinite where sigma = 0, so that the error is taken after
    multiplication by ``sigma source_std^2``: the weight sigma^2 of score matching, under which the loss is that of
    :class:`NoiseObjective`. The network's output has other units, and grows towards the data.

    Args:
        weight: see :class:`NoiseObjective`; 1 is ``(sigma source_std^2)^2`` on the squared error of the score.
        clip: see :class:`NoiseObjective`.

    References:
        Vincent 2011, doi 10.1162/NECO_a_00142; Song and Ermon 2019, arXiv 1907.05600, eq. 6 (the weight sigma^2).

    Example:
        >>> objective = ScoreObjective().for_path(LinearPath(), source_std=2.0)
        >>> point = LinearPath().sample(x0=torch.ones(1, 2), x1=torch.zeros(1, 2), t=torch.tensor([0.5]))
        >>> objective.error(torch.full((1, 2), -0.5), point)  # -x0 / (sigma source_std^2)
        tensor([0.])
    """

    prediction = "score"

    @property
    def needs_gaussian_source(self) -> bool:
        """Always: there is no score of another source in closed form."""
        return True

    def estimate(self, output: Tensor, t: Tensor) -> Tensor:
        """The source point that the score stands for."""
        sigma = self._bound.path.coefficients(t).sigma
        return -(self._bound.source_std**2) * sigma * output
