"""Are generated samples copies of the training set? Distances to the nearest training sample, against held-out data."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.metrics.pairwise import Neighbours, distance_blocks
from flowbench.metrics.table_checks import as_table, check_tables

__all__ = ["Memorization", "authenticity", "data_copying", "memorization", "nearest_neighbours"]

_REFERENCE_CHUNK = 8192


class Memorization(NamedTuple):
    """How close generated samples come to the training set.

    Attributes:
        authenticity: share of generated samples that are farther from their nearest training sample than that
            one is from its own nearest neighbour. 0 for copies; for fresh samples of the data's distribution
            1/3 in one dimension, 0.38 in two, towards 1/2 in many.
        copying_z: :func:`data_copying` against the held-out samples. Standard normal for fresh samples, far
            below 0 for copies, above 0 for samples that lie off the data.
        median_ratio: median distance of generated samples to the training set over that of held-out samples;
            1 for fresh samples, 0 for copies.
        generated: indices of the most suspicious generated samples, the worst first.
        train: indices of their nearest training samples.
        ratios: their distance over the distance of the training sample to its own nearest neighbour.

    Example:
        >>> train, heldout = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [2.0]])
        >>> copies = memorization(train, train, heldout)
        >>> copies.authenticity, copies.median_ratio, copies.copying_z < 0
        (0.0, 0.0, True)
        >>> fresh = memorization(heldout, train, heldout)
        >>> fresh.authenticity, fresh.median_ratio, fresh.copying_z
        (0.0, 1.0, 0.0)
    """

    authenticity: float
    copying_z: float
    median_ratio: float
    generated: Tensor
    train: Tensor
    ratios: Tensor


def nearest_neighbours(queries: Tensor, references: Tensor, k: int = 1, chunk_size: int = 1024) -> Neighbours:
    """The k nearest references of each query, Euclidean, exact.

    Args:
        queries: shape (N, *D).
        references: shape (M, *D), of any type; converted in slices, so a uint8 memory map of a whole training
            set serves.
        k: how many, >= 1.
        chunk_size: queries at a time, >= 1; does not change the result.

    Returns:
        Distances and indices, both (N, k), nearest first; equal distances by index.

    Raises:
        ValueError: no queries, fewer than k references, widths that differ, or values that are not finite.
    """
    check_count("k", k, at_most=max(1, len(references)), hint="at most the number of references")
    check_count("chunk_size", chunk_size)
    if not len(references):
        raise ValueError("references are empty, neighbours need at least one")
    table = as_table(queries, "queries")
    distance = table.new_empty(len(table), 0)
    index = torch.empty(len(table), 0, dtype=torch.int64, device=table.device)
    for start in range(0, len(references), _REFERENCE_CHUNK):
        _, part = check_tables(table, references[start : start + _REFERENCE_CHUNK], ("queries", "references"))
        found = [block.nearest(min(k, len(part))) for block in distance_blocks(table, part, chunk_size)]
        # The earlier slice stands first and the sort is stable, so equal distances keep the lowest index.
        distance, order = torch.cat([distance, *_column(found, 0)], dim=1).sort(dim=1, stable=True)
        index = torch.cat([index, *(i + start for i in _column(found, 1))], dim=1).gather(1, order)[:, :k]
        distance = distance[:, :k]
    return Neighbours(distance, index)


def authenticity(generated: Tensor, train: Tensor) -> float:
    """Share of generated samples that are no mere noise around one training sample.

    A sample counts as authentic when its nearest training sample has a nearer neighbour in the training set
    than the generated sample is. With fresh samples the opposite happens where the two are each other's nearest
    neighbours: probability 2/3 in one dimension, 0.6215 in two, towards 1/2 in many (Schilling, 1986).

    Args:
        generated: features, shape (M, *D).
        train: features, shape (N, *D), N at least 2. Duplicates in it hide copies of them from this measure
            only if they are not exact.

    References:
        How Faithful is your Synthetic Data? (Alaa et al., 2022), https://arxiv.org/abs/2102.08921, section 3.3.

    Raises:
        ValueError: fewer than two training samples, widths that differ, or values that are not finite.
    """
    nearest = nearest_neighbours(generated, train)
    return float((nearest.distances[:, 0] > _own_distance(train, nearest.indices[:, 0])).double().mean())


def data_copying(generated: Tensor, heldout: Tensor) -> float:
    """Mann-Whitney z of distances to the training set: C_T on one cell.

    Standard normal where generated and held-out samples come from one distribution, whatever it is, because
    given the training set both sets of distances are independent draws of one law.

    Args:
        generated: distances of generated samples to their nearest training sample, shape (M,).
        heldout: the same of held-out samples, shape (N,).

    Returns:
        z: below -3 indicates copying, above 3 underfitting. Ties count half and shrink the variance; 0 where
        all distances are equal.

    References:
        A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan, Chaudhuri, Dasgupta, 2020),
        https://arxiv.org/abs/2004.05675.

    Raises:
        ValueError: an empty side, a shape other than (N,), or NaN.
    """
    for name, values in (("generated", generated), ("heldout", heldout)):
        if values.ndim != 1 or not len(values) or values.isnan().any():
            raise ValueError(f"{name} must be at least one distance, shape (N,), without NaN, got {list(values.shape)}")
    m, n = len(generated), len(heldout)
    pooled = torch.cat([generated.to(torch.float64), heldout.to(generated.device, torch.float64)])
    _, place, counts = pooled.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2.0)[place]
    wins = float(ranks[:m].sum()) - m * (m + 1) / 2
    total = m + n
    ties = float((counts.double() ** 3 - counts).sum()) / (total * (total - 1))
    variance = m * n / 12 * (total + 1 - ties)
    return (wins - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0


def memorization(generated: Tensor, train: Tensor, heldout: Tensor, num_worst: int = 16) -> Memorization:
    """All measures of copying at once, with the worst pairs for a picture.

    Args:
        generated: features of generated samples, shape (M, *D).
        train: features of the training set, shape (N, *D), N at least 2.
        heldout: features of samples that the model never saw, shape (K, *D).
        num_worst: how many pairs to return at most, >= 0.

    Raises:
        ValueError: an empty side, fewer than two training samples, widths that differ, values that are not
            finite, or ``num_worst`` below 0.
    """
    check_count("num_worst", num_worst, at_least=0)
    nearest = nearest_neighbours(generated, train)
    distance, index = nearest.distances[:, 0], nearest.indices[:, 0]
    own = _own_distance(train, index)
    fresh = nearest_neighbours(heldout, train).distances[:, 0]
    # An exact copy is the worst there is, also where the training set holds the same sample twice (0 / 0).
    ratios = torch.where(distance > 0, distance / own, 0.0)
    worst = ratios.argsort(stable=True)[:num_worst]
    return Memorization(
        authenticity=float((distance > own).double().mean()),
        copying_z=data_copying(distance, fresh),
        median_ratio=_median_ratio(distance, fresh),
        generated=worst,
        train=index[worst],
        ratios=ratios[worst],
    )


def _median_ratio(distance: Tensor, fresh: Tensor) -> float:
    low, high = float(distance.quantile(0.5)), float(fresh.quantile(0.5))
    if high == 0:
        return 1.0 if low == 0 else math.inf
    return low / high


def _own_distance(train: Tensor, index: Tensor) -> Tensor:
    """Distance of the training samples at ``index`` (M,) to their nearest other training sample, shape (M,)."""
    if len(train) < 2:
        raise ValueError(f"train has {len(train)} samples, its own neighbours need at least 2")
    # Only those that some generated sample is nearest to: far fewer than all pairs of a training set.
    used, place = index.unique(return_inverse=True)
    return nearest_neighbours(train[used.to(train.device)], train, k=2).distances[:, 1].to(index.device)[place]


def _column(found: list[Neighbours], which: int) -> list[Tensor]:
    return [torch.cat([block[which] for block in found])]
