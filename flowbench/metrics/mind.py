"""A distance between feature distributions that few samples suffice for: transport along random directions."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.metrics.table_checks import check_tables
from flowbench.metrics.transport import sliced_wasserstein2

__all__ = ["mind"]


def mind(x: Tensor, y: Tensor, generator: torch.Generator, num_projections: int = 1000) -> float:
    """MIND: ``3 D`` times the mean squared 1-D Wasserstein distance over random unit directions.

    The factor makes a shift of the mean by ``m`` cost ``3 |m|^2``, three times what it costs in a Frechet distance. No
    moments are fitted, so samples that match mean and covariance alone are not at 0, and the bias at N samples follows
    the features' total variance, not their number D. Each 1-D distance is exact (sorted projections, float64), for
    unequal numbers of samples too; the published code takes equal numbers, in float32.

    Args:
        x: features, shape (N, *D).
        y: features, shape (M, *D).
        generator: CPU generator of the directions; seed it alike for numbers that are to be compared.
        num_projections: number of directions, >= 1.

    Returns:
        In squared feature units, >= 0; 0 for equal sets. Symmetric. Biased upwards by about 1 / N.

    References:
        MIND (2026), https://arxiv.org/abs/2605.06797.

    Raises:
        ValueError: an empty side, widths that differ, values that are not finite, or no projection.
    """
    check_count("num_projections", num_projections)
    x, y = check_tables(x, y)
    return 3 * x.shape[1] * sliced_wasserstein2(x, y, num_projections, generator, squared=True)
