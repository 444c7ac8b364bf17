"""Fidelity and diversity from nearest neighbours: precision and recall, density and coverage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.metrics.pairwise import distance_blocks
from flowbench.metrics.table_checks import check_tables

__all__ = ["DensityCoverage", "PrecisionRecall", "density_coverage", "precision_recall"]


class PrecisionRecall(NamedTuple):
    """Precision, the fidelity of generated samples, and recall, their diversity; both in [0, 1].

    Example:
        >>> real, generated = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.0], [0.1]])
        >>> precision_recall(real, generated, k=1)  # good samples, but of a quarter of the data
        PrecisionRecall(precision=1.0, recall=0.25)
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, the fidelity of generated samples (at least 0, may exceed 1), and coverage, their diversity (in [0, 1]).

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> density_coverage(real, real.clone(), k=1)
        DensityCoverage(density=1.0, coverage=1.0)
        >>> density_coverage(real, torch.zeros(4, 1), k=1)  # one point again and again
        DensityCoverage(density=1.0, coverage=0.25)
    """

    density: float
    coverage: float


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, chunk_size: int = 1024) -> PrecisionRecall:
    """Improved precision and recall.

    Precision is the share of generated samples inside the k-nearest-neighbour ball of some real sample,
    recall the share of real samples inside the ball of some generated one. Balls are closed. A collapsed
    model has high precision and low recall.

    Args:
        real: features of real samples, shape (N, *D).
        generated: features of generated samples, shape (M, *D).
        k: which neighbour, >= 1 (not counting the sample itself), sets the radius.
        chunk_size: rows of the distance matrix held at a time, >= 1; does not change the result.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019),
        https://arxiv.org/abs/1904.06991.

    Raises:
        ValueError: a side with k or fewer samples, widths that differ, or values that are not finite.
    """
    check_count("chunk_size", chunk_size)
    real, generated = _check(real, generated, k)
    real_radii, generated_radii = _radii(real, k, chunk_size), _radii(generated, k, chunk_size)
    precise = []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, block in zip(
        generated_radii.split(chunk_size), distance_blocks(generated, real, chunk_size), strict=True
    ):
        precise.append(block.within_points(real_radii, closed=True).any(dim=1))
        recalled |= block.within_rows(rows, closed=True).any(dim=0)
    return PrecisionRecall(float(torch.cat(precise).double().mean()), float(recalled.double().mean()))


def density_coverage(real: Tensor, generated: Tensor, k: int = 5, chunk_size: int = 1024) -> DensityCoverage:
    """Density and coverage.

    Density is the number of real balls that hold a generated sample, divided by k, averaged over generated
    samples (1 in expectation for equal distributions). Coverage is the share of real balls that hold a
    generated sample. Balls are open, as in the authors' code, so k + 1 coinciding real samples have balls
    that hold nothing.

    Args:
        real: features of real samples, shape (N, *D).
        generated: features of generated samples, shape (M, *D).
        k: which neighbour, >= 1 (not counting the sample itself), sets the radius.
        chunk_size: rows of the distance matrix held at a time, >= 1; does not change the result.

    References:
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020),
        https://arxiv.org/abs/2002.09797.

    Raises:
        ValueError: a side with k or fewer samples, widths that differ, or values that are not finite.
    """
    check_count("chunk_size", chunk_size)
    real, generated = _check(real, generated, k)
    radii = _radii(real, k, chunk_size)
    balls = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for block in distance_blocks(generated, real, chunk_size):
        inside = block.within_points(radii, closed=False)
        balls += int(inside.sum())
        covered |= inside.any(dim=0)
    return DensityCoverage(balls / (k * len(generated)), float(covered.double().mean()))


def _check(real: Tensor, generated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_count("k", k)
    return check_tables(real, generated, ("real", "generated"), minimum=k + 1)


def _radii(x: Tensor, k: int, chunk_size: int) -> Tensor:
    """Distance of each sample to its k-th neighbour, shape (N,); the sample itself is the 0-th."""
    return torch.cat([block.nearest(k + 1).distances[:, k] for block in distance_blocks(x, x, chunk_size)])
