"""At which times a flow is trained: distributions of t over [0, 1], 0 = source and 1 = data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowbench.core.checks import SMALLEST, check_number, check_scale

__all__ = ["LogitNormalTimes", "PointTimes", "TimeDistribution", "UShapedTimes", "UniformTimes", "check_logit_mean"]


class TimeDistribution(ABC):
    """A distribution of training times.

    It weights the times in the loss: the same velocities are optimal under all of them, but a network of limited
    capacity is better where the density is high.

    Example:
        >>> class EarlyTimes(TimeDistribution):  # the first half only
        ...     def sample(self, num, generator, device="cpu"):
        ...         return 0.5 * torch.rand(num, generator=generator).to(device)
        ...     def density(self, t):
        ...         return torch.where(t <= 0.5, 2.0, 0.0)
        >>> EarlyTimes().density(torch.tensor([0.2, 0.8]))
        tensor([2., 0.])
    """

    @abstractmethod
    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Draw ``num`` independent times on the generator's device and move them: (num,) float32 in [0, 1]."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Density at times t in [0, 1], of any shape; it integrates to 1."""

    @property
    def trains_field(self) -> bool:
        """Whether velocities are trained over the interval: without, they make no differential equation."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class UniformTimes(TimeDistribution):
    """Uniform training times: every t in [0, 1] is equally likely.

    Example:
        >>> times = UniformTimes()
        >>> times.sample(1000, torch.Generator().manual_seed(0)).shape
        torch.Size([1000])
        >>> times.density(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1., 1., 1.])
    """

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Draw with ``torch.rand``."""
        return _uniform(num, generator).to(device)

    def density(self, t: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(t)


class LogitNormalTimes(TimeDistribution):
    """``log(t / (1 - t))`` is normal: times in the middle count more, both ends hardly at all.

    Args:
        mean: of the logit, in [-20, 20]; above 0 favours the data end, below 0 the source end (the sign is the other
            way round where papers run time from data to noise).
        std: of the logit, in [1e-12, 1e12]. Above sqrt(2), at mean 0, the density has two peaks.

    References:
        Esser et al. 2024, arXiv 2403.03206, section 3.1.

    Example:
        >>> times = LogitNormalTimes()
        >>> times.density(torch.tensor([0.0, 0.5, 1.0]))  # 4 / sqrt(2 pi) in the middle
        tensor([0.0000, 1.5958, 0.0000])
        >>> times.sample(1000, torch.Generator().manual_seed(0)).shape
        torch.Size([1000])
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        check_logit_mean(mean)
        check_scale("std", std, hint="for one single time use PointTimes")
        self.mean = mean
        self.std = std

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Logistic function of a normal draw."""
        normal = torch.randn(num, generator=generator, device=generator.device)
        return (self.mean + self.std * normal).sigmoid().to(device)

    def density(self, t: Tensor) -> Tensor:
        """Zero at both ends."""
        z = (t.logit() - self.mean) / self.std
        density = (-z.square() / 2).exp() / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where((t > 0) & (t < 1), density, torch.zeros_like(t))

    def __repr__(self) -> str:
        return f"LogitNormalTimes(mean={self.mean:g}, std={self.std:g})"


class UShapedTimes(TimeDistribution):
    """Density proportional to ``exp(a t) + exp(a (1 - t))``: both ends count more, for training on reflow pairs.

    Args:
        sharpness: a, in [1e-12, 100]; towards 0 the times become uniform.

    References:
        Lee, Lin and Fanti 2024, arXiv 2405.20320 (improved training of rectified flows).

    Example:
        >>> UShapedTimes(sharpness=4.0).density(torch.tensor([0.0, 0.5, 1.0]))
        tensor([2.0746, 0.5514, 2.0746])
    """

    def __init__(self, sharpness: float = 4.0) -> None:
        check_number("sharpness", sharpness, at_least=SMALLEST, at_most=100, hint="for equal times use UniformTimes")
        self.sharpness = sharpness

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Inverse of the distribution function, exact."""
        # The density is that of cosh(a (t - 1/2)), so the distribution function is an affine map of its sinh. In
        # float64: near 0 and 1 single precision would lose the tails of a sharp density.
        centred = 2 * _uniform(num, generator).double() - 1
        t = 0.5 + (centred * math.sinh(self.sharpness / 2)).asinh() / self.sharpness
        return t.clamp(0, 1).float().to(device)

    def density(self, t: Tensor) -> Tensor:
        """Largest at 0 and at 1, symmetric."""
        return self.sharpness * (self.sharpness * (t - 0.5)).cosh() / (2 * math.sinh(self.sharpness / 2))

    def __repr__(self) -> str:
        return f"UShapedTimes(sharpness={self.sharpness:g})"


class PointTimes(TimeDistribution):
    """One time for every sample, as for distilling a flow into its first step (t = 0).

    Velocities at other times are not trained, so a flow of these has no differential equation, and no density.

    Args:
        t: the time, in [0, 1].

    Example:
        >>> PointTimes(t=0.5).sample(3, torch.Generator())
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, t: float = 0.0) -> None:
        check_number("t", t, at_least=0, at_most=1, hint="0 is the source, 1 the data")
        self.t = t

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """The time, ``num`` times; the generator is left as it is."""
        return torch.full((num,), self.t, device=device)

    def density(self, t: Tensor) -> Tensor:
        """A point mass: infinite at its time, 0 elsewhere."""
        return torch.where(t == self.t, math.inf, 0.0).to(t)

    @property
    def trains_field(self) -> bool:
        """Only at its time."""
        return False

    def __repr__(self) -> str:
        return f"PointTimes(t={self.t:g})"


def check_logit_mean(mean: float) -> None:
    """Refuse a mean of ``log(t / (1 - t))`` at which all times are 0 or 1 in float32.

    Raises:
        ValueError: for a number outside of [-20, 20].
    """
    check_number("mean", mean, at_least=-20, at_most=20, hint="it is the mean of the logit of t")


def _uniform(num: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num, generator=generator, device=generator.device)
