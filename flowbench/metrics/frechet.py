"""Frechet distance between Gaussians fitted to features, from sums that add up over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.distributed import sum_over_processes
from flowbench.metrics.table_checks import as_table

__all__ = [
    "FeatureStatistics",
    "GaussianStatistics",
    "Moments",
    "covariance_root",
    "decomposed",
    "features_root",
    "frechet_distance",
    "frechet_distance_of_features",
    "gaussian_frechet_distance",
]


# Eigenvalues of covariances in float32 files are off by less than this share of the largest.
_INDEFINITE = 1e-3


class FeatureStatistics:
    """Count, sum and sum of outer products of features, in float64.

    Sums rather than means, so that batches, ranks and files are merged by addition and the result does not
    depend on how the samples were split. The covariance divides by N - 1.

    Args:
        dimension: D, the width of a feature vector, 1 to 1e6.
        device: where the sums lie; float64 is needed, so not ``mps``.

    Raises:
        ValueError: ``dimension`` out of range.

    Example:
        >>> statistics = FeatureStatistics(dimension=1)
        >>> statistics = statistics.update(torch.tensor([[0.0], [1.0]])).update(torch.tensor([[2.0]]))  # two batches
        >>> statistics.count, statistics.mean, statistics.covariance
        (3, tensor([1.], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        check_count("dimension", dimension, at_most=10**6)
        self.dimension = dimension
        self.count = 0
        self.sum = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    @classmethod
    def from_sums(cls, count: int, total: Tensor, outer: Tensor) -> FeatureStatistics:
        """Statistics from their three sums: N, shape (D,) and shape (D, D)."""
        if total.ndim != 1 or outer.shape != (len(total), len(total)):
            raise ValueError(f"sums must be (D,) and (D, D), got {tuple(total.shape)} and {tuple(outer.shape)}")
        statistics = cls(len(total), total.device)
        statistics.count = int(count)
        statistics.sum = total.to(torch.float64)
        statistics.outer = outer.to(torch.float64)
        return statistics

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features of shape (N, *D), on their device."""
        table = as_table(features, "features")
        return cls(table.shape[1], table.device).update(table)

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add a batch of features of shape (N, *D); returns self.

        Raises:
            ValueError: the width is not ``dimension``, or a feature is not finite.
        """
        table = as_table(features, "features", minimum=0).to(self.sum.device)
        if len(table) and table.shape[1] != self.dimension:
            raise ValueError(f"features have {table.shape[1]} dimensions, these statistics have {self.dimension}")
        if len(table):
            self.count += len(table)
            self.sum += table.sum(dim=0)
            self.outer += table.T @ table
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets of samples together, as a new object on the device of ``self``.

        Raises:
            ValueError: the dimensions differ.
        """
        _same_dimension(self, other)
        device = self.sum.device
        return self.from_sums(
            self.count + other.count, self.sum + other.sum.to(device), self.outer + other.outer.to(device)
        )

    def all_reduce(self) -> FeatureStatistics:
        """Statistics over all processes, as a new object; a copy where there is only one.

        One collective. The object itself keeps its local sums, so a second call does not count the samples
        twice.
        """
        packed = sum_over_processes(torch.cat([self.sum.new_tensor([self.count]), self.sum, self.outer.flatten()]))
        count, total, outer = packed.split([1, self.dimension, self.dimension**2])
        return self.from_sums(int(count.item()), total.clone(), outer.reshape(self.dimension, -1).clone())

    @property
    def mean(self) -> Tensor:
        """Mean feature, shape (D,), float64.

        Raises:
            ValueError: no sample was seen.
        """
        self._need(1, "mean")
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (N - 1), shape (D, D), float64, symmetric.

        Raises:
            ValueError: fewer than two samples were seen.
        """
        self._need(2, "covariance")
        scatter = self.outer - torch.outer(self.sum, self.sum / self.count)
        return (scatter + scatter.T) / (2 * (self.count - 1))

    def _need(self, minimum: int, what: str) -> None:
        if self.count < minimum:
            raise ValueError(f"the {what} needs at least {minimum} samples, got {self.count}; add features first")


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of features without the sums behind them, as files of other tools hold them.

    Args:
        mean: shape (D,).
        covariance: shape (D, D), symmetric.
        count: samples that the moments were taken from, >= 1; None where it is not known.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a covariance that is not symmetric.

    Example:
        >>> a = GaussianStatistics(mean=torch.zeros(2), covariance=torch.eye(2))
        >>> b = GaussianStatistics(mean=torch.tensor([3.0, 4.0]), covariance=4 * torch.eye(2))
        >>> round(frechet_distance(a, b), 4)  # |m|^2 + 2 (2 - 1)^2
        27.0
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        check_count("count", self.count, or_none=True)
        mean, covariance = self.mean.to(torch.float64), self.covariance.to(torch.float64)
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"moments must be (D,) and (D, D), got {tuple(mean.shape)} and {tuple(covariance.shape)}; "
                "take both from the same features"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("moments hold NaN or infinity; make the statistics again")
        gap, scale = float((covariance - covariance.T).abs().max()), float(covariance.abs().max())
        if gap > 1e-4 * scale:  # float32 files are off by 1e-7
            raise ValueError(f"the covariance is not symmetric (off by {gap:g}); make the statistics again")
        if float(covariance.diagonal().min()) < 0:
            raise ValueError(
                f"the covariance has a variance of {float(covariance.diagonal().min()):g}; make the statistics again"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", (covariance + covariance.T) / 2)

    @property
    def dimension(self) -> int:
        """D, the width of a feature vector."""
        return len(self.mean)


Moments: TypeAlias = FeatureStatistics | GaussianStatistics
"""What a Frechet distance can be taken from: sums, or moments alone."""


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians of two sets of features.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``: the FID when the features are Inception's pool3. Units:
    squared feature units. Biased upwards for small N, so compare only numbers with the same N.

    References:
        GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al.,
        2017), https://arxiv.org/abs/1706.08500.

    Raises:
        ValueError: the dimensions differ, or a side has fewer than two samples.
    """
    _same_dimension(a, b)
    return _distance(a.mean, covariance_root(a), b.mean, covariance_root(b))


def frechet_distance_of_features(a: Tensor, b: Tensor | Moments) -> float:
    """:func:`frechet_distance` from features, by the cheaper route.

    With fewer samples than features the centred samples themselves are the root of the covariance, so no
    eigenvalues of a D x D matrix are needed and no covariance is formed: N = 500, D = 2048 costs a fifth.

    Args:
        a: features, shape (N, *D).
        b: features, shape (M, *D), or statistics of the other side.

    Raises:
        ValueError: a side with fewer than two samples, widths that differ, or values that are not finite.
    """
    first = as_table(a, "a", minimum=2)
    if not isinstance(b, Tensor):
        width, other_mean, other_root = b.dimension, b.mean, covariance_root(b)
    else:
        second = as_table(b, "b", minimum=2)
        width, other_mean, other_root = second.shape[1], second.mean(dim=0), features_root(second)
    if first.shape[1] != width:
        raise ValueError(f"feature dimensions differ: {first.shape[1]} and {width}; use one feature network")
    return _distance(first.mean(dim=0), features_root(first), other_mean, other_root)


def gaussian_frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    The trace of ``(S1 S2)^(1/2)`` is the nuclear norm of ``F1 F2^T`` with ``S = F^T F``. The eigenvalues of
    ``S1 S2`` give the same number, but the root of a zero eigenvalue's rounding error (1e-16 -> 1e-8) would
    dominate where the covariances are singular, as they are for fewer samples than features.

    Args:
        mean_a: shape (D,).
        cov_a: shape (D, D), symmetric and positive semi-definite.
        mean_b: shape (D,).
        cov_b: shape (D, D).

    Returns:
        The distance, at least 0.
    """
    roots = [_root(covariance.to(torch.float64), len(covariance)) for covariance in (cov_a, cov_b)]
    return _distance(mean_a.to(torch.float64), roots[0], mean_b.to(torch.float64), roots[1])


def covariance_root(moments: Moments) -> Tensor:
    """F of shape (rank, D) with ``F^T F`` the covariance; the rank is at most N - 1 where N is known."""
    count = moments.count
    rank = moments.dimension if count is None else max(1, min(moments.dimension, count - 1))
    return _root(moments.covariance, rank)


def features_root(table: Tensor) -> Tensor:
    """F of shape (min(N, D), D) with ``F^T F`` the covariance of features (N, D), float64."""
    centred = (table - table.mean(dim=0)) / math.sqrt(len(table) - 1)
    return centred if len(table) <= table.shape[1] else torch.linalg.qr(centred, mode="r").R


def _distance(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    mean_b, root_b = mean_b.to(mean_a.device), root_b.to(root_a.device)
    cross = decomposed(torch.linalg.svdvals, root_a @ root_b.T).sum()
    traces = root_a.square().sum() + root_b.square().sum()
    distance = float((mean_a - mean_b).square().sum() + traces - 2 * cross)
    if not math.isfinite(distance):
        raise ValueError("the covariance of the features overflows: scale the features down")
    return max(0.0, distance)


def decomposed(decompose: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    """Singular or eigenvalues of a matrix of covariances.

    Raises:
        ValueError: where it holds no finite numbers, or LAPACK's iteration does not converge.
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError("the covariance of the features overflows: scale the features down")
    try:
        return decompose(matrix)
    except torch.linalg.LinAlgError as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"the root of the covariances has not converged ({reason}): check the features") from None


def _root(covariance: Tensor, rank: int) -> Tensor:
    """F with F^T F = covariance; eigenvalues below 0, and those beyond the rank, are rounding and count as zero.

    Raises:
        ValueError: for eigenvalues further below 0 than rounding: the matrix is no covariance.
    """
    if rank == len(covariance):
        # Cholesky costs a tenth of the eigenvalues, and is as exact where no pivot is near rounding error.
        upper, failed = torch.linalg.cholesky_ex(covariance, upper=True)
        pivots = upper.diagonal().square()
        if not failed and pivots.min() > 1e-10 * pivots.max():
            return upper
    values, vectors = decomposed(torch.linalg.eigh, covariance)
    if values[0] < -_INDEFINITE * values[-1].abs():
        raise ValueError(
            f"this is no covariance, its eigenvalues go from {values[0]:.3g} to {values[-1]:.3g}: make it again"
        )
    return (vectors * values.clamp(min=0).sqrt())[:, -rank:].T


def _same_dimension(a: Moments, b: Moments) -> None:
    if a.dimension != b.dimension:
        raise ValueError(f"feature dimensions differ: {a.dimension} and {b.dimension}; use one feature network")
