"""Weights: how much a pair of a source and a data point counts in the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["UniformWeight", "Weight", "WeightResult"]


@dataclass(frozen=True)
class WeightResult:
    """Weights of a batch of pairs.

    Attributes:
        weight: shape (B,), >= 0, without gradient.
        diagnostics: named scalars of this batch (this process's share of it) to log, or a function that computes them,
            called only on logging steps, because it is expensive.

    Example:
        >>> result = GibbsWeight(epsilon=1.0, normalization="raw")(torch.zeros(2, 1), torch.ones(2, 1))
        >>> result.weight  # exp(-1)
        tensor([0.3679, 0.3679])
        >>> sorted(result.diagnostics())
        ['ess', 'max_share', 'tilt_source', 'tilt_target', 'unweighted_cost', 'weighted_cost']
    """

    weight: Tensor
    diagnostics: dict[str, Tensor] | Callable[[], dict[str, Tensor]] = field(default_factory=dict)


class Weight(nn.Module, ABC):
    """A weight for each pair, given its two ends.

    Example:
        >>> class NearPairs(Weight):  # pairs farther apart than 1 do not count
        ...     def log_weight(self, x0, x1):
        ...         return torch.where((x1 - x0).flatten(1).norm(dim=1) <= 1, 0.0, -torch.inf)
        ...     def forward(self, x0, x1):
        ...         return WeightResult(self.log_weight(x0, x1).exp())
        >>> NearPairs()(torch.zeros(2, 1), torch.tensor([[0.5], [3.0]])).weight
        tensor([1., 0.])
    """

    @property
    def needs_fit(self) -> bool:
        """Whether :meth:`fit`, or a checkpoint of a fitted weight, must come before the first batch."""
        return False

    def fit(
        self,
        source_points: Tensor,
        data_points: Tensor,
        generator: torch.Generator,
        isotropic: bool,
        *,
        source_std: float | None = None,
    ) -> None:
        """Fit what the weight depends on to samples of its two ends; does nothing where ``needs_fit`` is false.

        The result is part of the state dict.

        Args:
            source_points: shape (N, *D).
            data_points: shape (M, *D).
            generator: source of the random draws; the same on all processes.
            isotropic: whether the source is invariant to rotations about the origin.
            source_std: standard deviation per coordinate of a source that is N(0, source_std^2 I), which then is
                integrated exactly; None for any other.
        """

    @abstractmethod
    def forward(self, x0: Tensor, x1: Tensor) -> WeightResult:
        """Weights of the pairs (x0[i], x1[i]); both of shape (B, *D)."""

    @abstractmethod
    def log_weight(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Logarithms of the weights of pairs (B, *D), up to a constant: shape (B,), a function of each pair alone.

        Unlike :meth:`forward` it neither normalises nor communicates with other processes, and changes no state.
        """

    @torch.no_grad()
    def log_weight_matrix(self, x0: Tensor, x1: Tensor) -> Tensor:
        """:meth:`log_weight` of every pair of the points x0 (N, *D) and x1 (M, *D): shape (N, M)."""
        return torch.stack([self.log_weight(point.expand_as(x1), x1) for point in x0])


class UniformWeight(Weight):
    """Every pair counts the same: plain flow matching.

    Example:
        >>> UniformWeight()(torch.zeros(3, 2), torch.ones(3, 2)).weight
        tensor([1., 1., 1.])
    """

    def forward(self, x0: Tensor, x1: Tensor) -> WeightResult:
        """Weights of one."""
        return WeightResult(torch.ones(len(x1), device=x1.device))

    def log_weight(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros(len(x1), device=x1.device)

    def log_weight_matrix(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros(len(x0), len(x1), device=x1.device)
