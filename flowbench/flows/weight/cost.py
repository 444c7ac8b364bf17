"""Transport costs between points, for weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowbench.core.autocast import autocast_off

__all__ = ["COSTS", "Cost", "cost_matrix", "flat_points", "pair_cost"]

Cost = Literal["norm", "squared"]
COSTS: tuple[Cost, ...] = ("norm", "squared")

# Up to this many dimensions differences are taken one by one: exact for points that nearly coincide.
DIRECT_DIMS = 16


def flat_points(x: Tensor) -> Tensor:
    """Points (B, *D) without gradient, shape (B, d), in float32 or wider."""
    x = x.detach() if x.ndim == 2 else x.detach().flatten(1)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def pair_cost(x0: Tensor, x1: Tensor, cost: Cost) -> Tensor:
    """Costs of the pairs (x0[i], x1[i]), both of shape (B, d); returns (B,)."""
    distance = torch.linalg.vector_norm(x0 - x1, dim=1)
    return distance if cost == "norm" else distance.square_()


def cost_matrix(x0: Tensor, x1: Tensor, cost: Cost) -> Tensor:
    """Costs of all pairs of x0 (N, d) and x1 (M, d), shape (N, M), in their own precision even under autocast."""
    if x0.shape[1] <= DIRECT_DIMS:
        distance = torch.cdist(x0, x1, compute_mode="donot_use_mm_for_euclid_dist")
        return distance if cost == "norm" else distance.square()
    squared = _expanded_squares(x0, x1)
    return squared if cost == "squared" else squared.sqrt_()


def _expanded_squares(x0: Tensor, x1: Tensor) -> Tensor:
    # Distances do not change under a common shift, but the expanded square loses digits to it.
    centre = x1.mean(0)
    a, b = x0 - centre, x1 - centre
    with autocast_off(a.device):
        norms = a.square().sum(1)[:, None] + b.square().sum(1)
        return torch.addmm(norms, a, b.T, alpha=-2).clamp_(min=0)
