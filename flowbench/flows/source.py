"""Source distributions: where a flow starts at time 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from flowbench.seeds import indexed_normal

__all__ = ["GaussianSource", "Source"]


class Source(ABC):
    """A distribution with a density that is easy to draw from."""

    @abstractmethod
    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw ``num`` independent points, shape (num, *shape), on ``device``."""

    @abstractmethod
    def sample_indexed(
        self,
        indices: Iterable[int] | Tensor,
        shape: tuple[int, ...],
        seed: int,
        *names: str | int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw one point per sample index, shape (N, *shape), the same for any batching and world size."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of x, shape (B, *D); returns (B,) in float64."""


class GaussianSource(Source):
    """Isotropic normal distribution N(0, std^2 I).

    Args:
        std: standard deviation of each coordinate, > 0.
    """

    def __init__(self, std: float = 1.0) -> None:
        if not (std > 0 and math.isfinite(std)):
            raise ValueError(f"std must be positive and finite, got {std}")
        self.std = std

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw on the generator's device and move: a CPU generator gives the same noise to every device."""
        return self.std * torch.randn(num, *shape, generator=generator, device=generator.device).to(device)

    def sample_indexed(
        self,
        indices: Iterable[int] | Tensor,
        shape: tuple[int, ...],
        seed: int,
        *names: str | int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Noise keyed by (seed, names, index), see :func:`flowbench.seeds.indexed_normal`."""
        return self.std * indexed_normal(indices, shape, seed, *names, device=device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, summed over the dimensions in float64."""
        z = x.flatten(1).double() / self.std
        return -0.5 * z.square().sum(1) - z.shape[1] * (math.log(self.std) + 0.5 * math.log(2 * math.pi))

    def __repr__(self) -> str:
        return f"GaussianSource(std={self.std:g})"
