"""Wasserstein-2 distances between samples: exact, and sliced."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.no_solution import NoSolutionError
from flowbench.metrics.table_checks import check_tables

__all__ = ["sliced_wasserstein2", "wasserstein2", "wasserstein2_squared"]

_MAX_ITERATIONS = 100_000_000


def wasserstein2(x: Tensor, y: Tensor, *, squared: bool = False) -> float:
    """Exact Wasserstein-2 distance between two empirical distributions with equal weights.

    Solved as a linear program on the N x M matrix of squared distances (sum over dimensions), so memory is 8
    N M bytes and time grows about as N^3: for a few thousand samples in low dimension. Biased upwards by a
    floor that falls as N^(-1/D); show the distance between two held-out sets of the same size beside it.

    Args:
        x: samples, shape (N, *D).
        y: samples, shape (M, *D); N and M may differ.
        squared: return W2^2 instead.

    Returns:
        W2 in data units, or W2^2 in squared data units.

    Raises:
        ValueError: an empty side, widths that differ, or values that are not finite.
        NoSolutionError: the linear program did not reach its optimum.
    """
    value = wasserstein2_squared(x, y)
    return value if squared else value**0.5


def wasserstein2_squared(x: Tensor, y: Tensor) -> float:
    """W2^2, the squared distance of :func:`wasserstein2`; the reference of the normalised path energy."""
    import ot  # slow to import (it probes every array library), and only this function needs it

    x, y = check_tables(x, y)
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
    # Empty weights mean uniform ones to POT.
    value, log = ot.emd2([], [], cost, numItermax=_MAX_ITERATIONS, log=True)
    if log["warning"] is not None:  # POT returns a plan that is not optimal and only warns
        raise NoSolutionError(f"optimal transport between {len(x)} and {len(y)} samples failed: {log['warning']}")
    return max(0.0, float(value))


def sliced_wasserstein2(
    x: Tensor, y: Tensor, num_projections: int, generator: torch.Generator, *, squared: bool = False
) -> float:
    """Sliced Wasserstein-2 distance: the root mean square of 1-D W2 over random directions.

    Each 1-D distance is exact, for unequal sizes too (quantile functions integrated piece by piece). No
    factor for the dimension is applied: a shift by m gives ``|m| / sqrt(D)`` in expectation of the square.

    Args:
        x: samples, shape (N, *D).
        y: samples, shape (M, *D).
        num_projections: number of directions, >= 1, uniform on the sphere.
        generator: CPU generator of the directions; seed it alike for numbers that are to be compared.
        squared: return the mean of the squares instead.

    References:
        Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
        https://doi.org/10.1007/s10851-014-0506-3.

    Raises:
        ValueError: an empty side, widths that differ, values that are not finite, or no projection.
    """
    check_count("num_projections", num_projections)
    x, y = check_tables(x, y)
    directions = torch.randn(num_projections, x.shape[1], generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(x.device)
    left, right, width = _quantile_pieces(len(x), len(y), x.device)
    total = 0.0
    for chunk in directions.split(64):
        first, second = (x @ chunk.T).sort(dim=0).values, (y @ chunk.T).sort(dim=0).values
        total += float((width @ (first[left] - second[right]).square()).sum())
    value = total / num_projections
    return value if squared else value**0.5


def _quantile_pieces(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the quantile functions of n and m points are both constant.

    Returns:
        Index into the n sorted points, index into the m, and the width of each piece (widths sum to 1). Cuts
        are counted in units of 1 / (n m), so they are exact integers.
    """
    cuts = torch.cat([torch.arange(n + 1, device=device) * m, torch.arange(1, m, device=device) * n]).unique()
    start = cuts[:-1]
    return start // m, start // n, cuts.diff().to(torch.float64) / (n * m)
