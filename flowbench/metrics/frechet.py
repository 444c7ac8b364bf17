"""Frechet distance between Gaussians fitted to features, from sums that add up over batches and processes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flowbench.metrics.checks import as_table
from flowbench.storage import write_atomic

__all__ = [
    "FeatureStatistics",
    "frechet_distance",
    "gaussian_frechet_distance",
    "load_statistics",
    "save_statistics",
]


class FeatureStatistics:
    """Count, sum and sum of outer products of features, in float64.

    Sums rather than means, so that batches, ranks and files are merged by addition and the result does not
    depend on how the samples were split. The covariance divides by N - 1.

    Args:
        dimension: D, the width of a feature vector.
        device: where the sums lie; float64 is needed, so not ``mps``.

    Raises:
        ValueError: ``dimension`` below 1.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
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
        packed = torch.cat([self.sum.new_tensor([self.count]), self.sum, self.outer.flatten()])
        if dist.is_available() and dist.is_initialized():
            # NCCL reduces only CUDA tensors; gloo takes the CPU's.
            carrier = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
            moved = packed.to(carrier)
            dist.all_reduce(moved, op=dist.ReduceOp.SUM)
            packed = moved.to(self.sum.device)
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


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
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
    return gaussian_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    The trace of ``(S1 S2)^(1/2)`` is the nuclear norm of ``R1^T R2`` with ``S = R R^T`` from the eigenvalues.
    The eigenvalues of ``S1 S2`` give the same number, but the root of a zero eigenvalue's rounding error
    (1e-16 -> 1e-8) would dominate where the covariances are singular, as they are for fewer samples than
    features.

    Args:
        mean_a: shape (D,).
        cov_a: shape (D, D), symmetric and positive semi-definite.
        mean_b: shape (D,).
        cov_b: shape (D, D).

    Returns:
        The distance, at least 0.
    """
    mean_a, cov_a = mean_a.to(torch.float64), cov_a.to(torch.float64)
    mean_b, cov_b = mean_b.to(mean_a), cov_b.to(cov_a)
    cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _factor(covariance: Tensor) -> Tensor:
    """R with R R^T = covariance; negative eigenvalues are rounding and count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _same_dimension(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.dimension != b.dimension:
        raise ValueError(f"feature dimensions differ: {a.dimension} and {b.dimension}; use one feature network")


def save_statistics(path: str | Path, statistics: FeatureStatistics, metadata: Mapping[str, Any]) -> None:
    """Write statistics and what they are of to an ``.npz`` file, atomically.

    Args:
        path: the file.
        statistics: the sums to store.
        metadata: JSON values that say what the numbers are of: data set, split, extractor and its checksum,
            resize.

    Raises:
        ValueError: ``metadata`` does not survive JSON.
    """
    try:
        text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must hold JSON values, got {dict(metadata)!r}: {error}") from None

    def write(file: IO[bytes]) -> None:
        np.savez(
            file,
            count=np.int64(statistics.count),
            sum=statistics.sum.cpu().numpy(),
            outer=statistics.outer.cpu().numpy(),
            metadata=np.str_(text),
        )

    write_atomic(path, write)


def load_statistics(
    path: str | Path, expected: Mapping[str, Any] | None = None
) -> tuple[FeatureStatistics, dict[str, Any]]:
    """Read what :func:`save_statistics` wrote; no pickle is ever loaded.

    Args:
        path: the file.
        expected: metadata that must agree; keys of the file that are absent here are not compared.

    Returns:
        The statistics (on the CPU) and their metadata.

    Raises:
        ValueError: the file is missing or damaged, or its metadata is not the expected.
    """
    if not Path(path).is_file():
        raise ValueError(f"no feature statistics at {path}; make them with save_statistics")
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
            total, outer = torch.from_numpy(file["sum"]), torch.from_numpy(file["outer"])
            statistics = FeatureStatistics.from_sums(int(file["count"]), total, outer)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read feature statistics {path} ({_line(error)}); delete and remake it") from None
    for key, value in (expected or {}).items():
        if metadata.get(key) != value:
            raise ValueError(f"statistics {path} have {key}={metadata.get(key)!r}, expected {value!r}; remake them")
    return statistics, metadata


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
