"""What every coupling shares: its interface, its cost matrix, and drawing source points from a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from flowbench.core import onednn
from flowbench.core.autocast import autocast_off
from flowbench.core.contract import ContractError, shaped
from flowbench.core.kernels import ONEDNN, PLAIN, Way, fastest, rounded_up

__all__ = ["Coupling", "CouplingCost", "draw_sources", "pairwise_cost", "squared_distances"]

CouplingCost = Literal["squared", "norm"]
_MANY_DIMENSIONS = 512
# Multiplications below which a choice between libraries costs more than it saves.
_MIN_WORK = 1 << 18


class Coupling(ABC):
    """A rule that pairs a batch of source points with a batch of data points.

    Example:
        >>> class NearestSource(Coupling):  # a source point may serve several data points
        ...     def _pair(self, x0, x1, generator, condition):
        ...         return squared_distances(x0, x1).argmin(dim=0)
        >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.1], [1.9], [2.2]])
        >>> NearestSource()(x0, x1, torch.Generator())
        tensor([0, 2, 2])
    """

    def __call__(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None = None) -> Tensor:
        """Choose a source point for every data point.

        Args:
            x0: N source points, shape (N, *D).
            x1: B data points, shape (B, *D); every one of them is used exactly once.
            generator: source of the random draws, if the rule needs any.
            condition: what each data point will be generated from: integer labels (B,) or real vectors
                (B, *K). Most rules ignore it.

        Returns:
            int64 indices into x0, shape (B,), on the device of x1: pair ``x0[index]`` with ``x1``.

        Raises:
            ValueError: if a batch is empty, the shapes of single points differ, or the rule needs conditions
                and does not get one per data point.
        """
        if x0.shape[1:] != x1.shape[1:] or not len(x0) or not len(x1):
            raise ValueError(
                f"a coupling needs non-empty batches of points of one shape, got {tuple(x0.shape)}"
                f" and {tuple(x1.shape)}"
            )
        condition = None if condition is None else condition.detach()
        index = shaped(self._pair(x0.detach(), x1.detach(), generator, condition), (len(x1),), self, "_pair")
        if index.dtype != torch.int64:
            raise ContractError(f"{type(self).__name__}._pair must return int64 indices, got {index.dtype}")
        return index.to(x1.device)

    @abstractmethod
    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None) -> Tensor: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared Euclidean distances in float64 between x0 (N, *D) and x1 (B, *D), shape (N, B).

    Float32 points on the CPU in 512 dimensions or more are multiplied in float32, in half the time or less: an entry
    may then be off by some 1e-7 of the mean, and an optimal assignment's mean cost by far less than
    1e-9 of itself (only pairs of nearly equal cost change places). Otherwise the error is that of float64.

    Raises:
        ValueError: if a point is not finite.
    """
    a, b = x0.flatten(1), x1.flatten(1)
    if not _may_multiply_in_float32(a, b):
        # Distances do not change under a common shift, but the expanded square loses digits to it.
        centre = b.mean(0, dtype=torch.float64)
        a, b = a.double() - centre, b.double() - centre
    cost = _product(a, b).double()
    cost.mul_(-2).add_(_squared_norms(a)[:, None]).add_(_squared_norms(b))
    if not cost.sum().isfinite():
        raise ValueError("a coupling met non-finite source or data points: check the data and the network's inputs")
    return cost.clamp_(min=0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` in the precision of the points, even under autocast."""
    on_cpu = a.device.type == b.device.type == "cpu"
    if on_cpu and a.dtype == torch.float32 and onednn.is_usable() and not onednn.needs_derivatives(a, b):
        shape = (rounded_up(len(a)), rounded_up(len(b)), a.shape[1])
        if a.numel() * len(b) >= _MIN_WORK and fastest("distances", shape, lambda: _ways(shape)) == ONEDNN:
            return onednn.linear(a, b)
    with autocast_off(a.device):
        return a @ b.T


def _ways(shape: tuple[int, int, int]) -> dict[str, Way]:
    """The product of points of a shape by each library."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(num, shape[2], generator=rng) for num in shape[:2])
    return {PLAIN: lambda: a @ b.T, ONEDNN: lambda: onednn.linear(a, b)}


def _squared_norms(points: Tensor) -> Tensor:
    if points.dtype == torch.float64:
        return points.square().sum(1)
    return torch.linalg.vector_norm(points, dim=1).double().square()


def _may_multiply_in_float32(a: Tensor, b: Tensor) -> bool:
    """Whether a float32 product pays, and is one: torch may be set to use fewer digits.

    Points whose common shift is as large as they are would lose digits to it.
    """
    on_cpu = a.device.type == b.device.type == "cpu" and torch.get_float32_matmul_precision() != "medium"
    if not on_cpu or not a.dtype == b.dtype == torch.float32 or a.shape[1] < _MANY_DIMENSIONS:
        return False
    return bool(b.mean(0).square().sum() <= 0.5 * _squared_norms(b).mean())


def pairwise_cost(x0: Tensor, x1: Tensor, cost: CouplingCost) -> Tensor:
    """Float64 costs between x0 (N, *D) and x1 (B, *D), shape (N, B): squared distances or distances."""
    squared = squared_distances(x0, x1)
    return squared.sqrt() if cost == "norm" else squared


def draw_sources(plan: Tensor, generator: torch.Generator) -> Tensor:
    """One row index per column of a plan (N, B), drawn with the column's probabilities; int64 (B,)."""
    cumulative = plan.T.cumsum(1)
    uniform = torch.rand(len(cumulative), generator=generator, device=generator.device, dtype=torch.float64)
    threshold = uniform.to(plan.device) * cumulative[:, -1]
    # right=True never lands on a row of probability zero.
    index = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    return index.clamp(max=len(plan) - 1)
