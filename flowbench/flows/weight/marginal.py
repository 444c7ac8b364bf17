"""Marginals of the Gibbs kernel: how much a point counts on average over the other side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.flows.weight.cost import Cost, cost_matrix, flat_points
from flowbench.flows.weight.epsilon import random_points
from flowbench.flows.weight.quadrature import EmpiricalRadii, GaussianRadii, radial_log_mean

__all__ = ["KernelMean"]

# Points of a table and how far it reaches beyond the largest norm of the data; the last piece goes on as a line.
TABLE_SIZE = 512
TABLE_MARGIN = 1.5


# What half the strata may change in the logarithm of a mean.
UNRESOLVED = 0.1


class KernelMean(nn.Module):
    """y -> log E_X exp(-c(X, y) / epsilon), after a fit of X.

    Either a table over |y| (:meth:`tabulate`, for a rotation-invariant X: a handful of operations per batch) or a sum
    over stored points (:meth:`store`: O(B M d) per batch, and the points travel in the checkpoint).

    The fitted tensors are extra state and not buffers: their shapes are unknown before the fit, and processes that fit
    alike need not broadcast them in every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.step = 1.0
        self.reference: Tensor | None = None

    @torch.no_grad()
    def tabulate(
        self, norms: Tensor, num_dims: int, epsilon: float, cost: Cost, radii: GaussianRadii | EmpiricalRadii
    ) -> None:
        """Tabulate against |y|, for a rotation-invariant X, from 0 to beyond the largest of ``norms`` (M,).

        Raises:
            ValueError: for an epsilon too small for the quadrature.
        """
        largest = TABLE_MARGIN * norms.max().item()
        # Any step serves where all points lie in the centre.
        self.step = largest / (TABLE_SIZE - 1) or 1.0
        grid = self.step * torch.arange(TABLE_SIZE, dtype=torch.float64)
        table = radial_log_mean(grid, num_dims, epsilon, cost, radii)
        if isinstance(radii, EmpiricalRadii):
            _check_resolved(table, grid, norms, num_dims, epsilon, cost, radii)
        self.table, self.reference = table.to(norms.device, torch.float32), None

    def store(self, points: Tensor, num: int, generator: torch.Generator) -> None:
        """Keep at most ``num`` random points (N, *D) of X."""
        kept = random_points(points, num, generator)
        self.table, self.reference = None, kept.to(flat_points(points).dtype)

    def forward(self, y: Tensor, epsilon: float, cost: Cost) -> Tensor:
        """Logarithms of the kernel's mean at points y (B, d), shape (B,)."""
        held = self.reference if self.table is None else self.table
        assert held is not None, "fit first"
        if held.device != y.device:  # extra state is loaded where the checkpoint was read to
            self._apply(lambda tensor: tensor.to(y.device))
        if self.table is not None:
            return self._interpolate(torch.linalg.vector_norm(y, dim=1))
        assert self.reference is not None
        log_kernel = cost_matrix(y, self.reference.to(y.dtype), cost).div_(-epsilon)
        return torch.logsumexp(log_kernel, 1) - math.log(len(self.reference))

    def _interpolate(self, norm: Tensor) -> Tensor:
        assert self.table is not None
        position = norm / self.step
        index = position.long().clamp_(0, len(self.table) - 2)  # NaN becomes any index, and stays NaN below
        return torch.lerp(self.table[index], self.table[index + 1], (position - index).to(self.table.dtype))

    def get_extra_state(self) -> dict[str, Any]:
        """The table or the stored points."""
        return {"table": self.table, "step": self.step, "reference": self.reference}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`get_extra_state` gave."""
        self.table, self.step, self.reference = state["table"], float(state["step"]), state["reference"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelMean:
        """Move with the module."""
        super()._apply(fn, recurse)
        self.table = None if self.table is None else fn(self.table)
        self.reference = None if self.reference is None else fn(self.reference)
        return self


def _check_resolved(
    table: Tensor, grid: Tensor, norms: Tensor, num_dims: int, epsilon: float, cost: Cost, radii: EmpiricalRadii
) -> None:
    """Refuse a kernel so narrow that it falls between the strata of the source's norms.

    Raises:
        ValueError: where half as many strata give other means at the norms of the data.
    """
    among = (grid >= norms.min().cpu()) & (grid <= norms.max().cpu())
    if not bool(among.any()):
        return
    coarse = radial_log_mean(grid[among], num_dims, epsilon, cost, replace(radii, num_strata=radii.num_strata // 2))
    change = (coarse - table[among]).abs().max().item()
    if not change <= UNRESOLVED:
        raise ValueError(
            f"g(y) over {radii.num_strata} strata of the source's norms has not converged at epsilon = {epsilon:.4g}:"
            f" half of them change it by exp({change:.2g}); raise epsilon"
        )
