"""Maximum mean discrepancy: polynomial kernel on features (KID), Gaussian kernels on points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowbench.core.checks import SMALLEST, check_count, check_number, check_numbers, check_scale
from flowbench.metrics.table_checks import as_table, check_tables

__all__ = ["KernelEstimate", "kernel_distance", "median_bandwidths", "mmd_rbf"]

_Kernel = Callable[[Tensor, Tensor], Tensor]
_CHUNK = 1024  # rows of a kernel matrix held at a time


class KernelEstimate(NamedTuple):
    """Estimate of a squared kernel distance (MMD^2), with its spread over subsets.

    Attributes:
        mean: the estimate of MMD^2, or its mean over subsets. Unbiased, so it may be below 0.
        std: standard deviation over the subsets (divided by their number); None for the full sets.

    Example:
        >>> x, y = torch.zeros(3, 1), torch.full((3, 1), 2.0)
        >>> kernel_distance(x, y, degree=1, gamma=1.0, coef=0.0)  # a linear kernel compares means
        KernelEstimate(mean=4.0, std=None)
    """

    mean: float
    std: float | None


def kernel_distance(
    x: Tensor,
    y: Tensor,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    subset_size: int | None = None,
    num_subsets: int = 100,
    generator: torch.Generator | None = None,
) -> KernelEstimate:
    """Unbiased squared MMD under the polynomial kernel ``(gamma <x, y> + coef)^degree``.

    The KID where the features are Inception's. All pairs are used unless ``subset_size`` is given: the full
    estimate is deterministic and has the smaller variance; subsets reproduce the published protocol.

    Args:
        x: features, shape (N, *D).
        y: features, shape (M, *D); N and M may differ.
        degree: 1 to 20.
        gamma: in [1e-12, 1e12]; None is 1 / D.
        coef: the kernel's constant, in [0, 1e12].
        subset_size: None for all pairs, or the number of samples, >= 2, drawn without replacement from each side.
        num_subsets: how many draws, >= 1; used with ``subset_size``.
        generator: CPU generator of the draws; needed with ``subset_size``.

    References:
        Demystifying MMD GANs (Binkowski et al., 2018), https://arxiv.org/abs/1801.01401.

    Raises:
        ValueError: fewer than two samples, widths that differ, values that are not finite, a number out of
            range, a subset larger than a side, or subsets without a generator.
    """
    check_count("degree", degree, at_most=20)
    check_scale("gamma", gamma, or_none=True)
    check_number("coef", coef, at_least=0)
    check_count("subset_size", subset_size, at_least=2, or_none=True)
    check_count("num_subsets", num_subsets)
    x, y = check_tables(x, y, minimum=2)
    scale = 1.0 / x.shape[1] if gamma is None else gamma

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (scale * (a @ b.T) + coef) ** degree

    if subset_size is None:
        return KernelEstimate(_unbiased_mmd(x, y, kernel), None)
    if generator is None:
        raise ValueError(f"subset_size={subset_size} draws subsets; pass a generator")
    check_count("subset_size", subset_size, at_least=2, at_most=min(len(x), len(y)), hint="at most the smaller set")
    values = [
        _unbiased_mmd(_subset(x, subset_size, generator), _subset(y, subset_size, generator), kernel)
        for _ in range(num_subsets)
    ]
    draws = torch.tensor(values, dtype=torch.float64)
    return KernelEstimate(float(draws.mean()), float(draws.std(correction=0)))


def mmd_rbf(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None) -> float:
    """Unbiased squared MMD under the mean of Gaussian kernels ``exp(-|x - y|^2 / (2 s^2))``.

    Args:
        x: samples, shape (N, *D), D small.
        y: reference samples, shape (M, *D).
        bandwidths: the widths s, data units, in (0, 1e12]. None takes :func:`median_bandwidths` of ``y`` alone, so that
            all contenders are measured with the same kernel.

    Returns:
        MMD^2 in units of the kernel (0 for equal distributions, below 2); unbiased, so it may be below 0.

    References:
        A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a.html, Lemma 6.

    Raises:
        ValueError: fewer than two samples, widths that differ, values that are not finite, or a bandwidth out
            of range.
    """
    x, y = check_tables(x, y, minimum=2)
    widths = median_bandwidths(y) if bandwidths is None else bandwidths
    check_numbers("bandwidths", widths, above=0)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # Differences, not the expanded square: its rounding error would show in narrow kernels.
        squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.stack([torch.exp(squared / (-2 * width**2)) for width in widths]).mean(dim=0)

    return _unbiased_mmd(x, y, kernel)


def median_bandwidths(
    reference: Tensor, factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0), max_points: int = 2000
) -> tuple[float, ...]:
    """Bandwidths around the median distance between reference samples.

    Args:
        reference: samples, shape (N, *D).
        factors: multiples of the median, in [1e-12, 1e12].
        max_points: >= 2; an evenly spaced subset of this size stands for a larger set (the pairs grow as N^2).

    Raises:
        ValueError: fewer than two samples, a number out of range, or a median of 0 (at least half of the pairs
            coincide).
    """
    check_numbers("factors", factors, at_least=SMALLEST)
    check_count("max_points", max_points, at_least=2)
    table = as_table(reference, "reference", minimum=2)
    table = table[:: -(-len(table) // max_points)]
    median = float(torch.pdist(table).median())
    if median == 0:
        raise ValueError("the median distance between reference samples is 0; give the bandwidths explicitly")
    return tuple(factor * median for factor in factors)


def _unbiased_mmd(x: Tensor, y: Tensor, kernel: _Kernel) -> float:
    return _mean_off_diagonal(x, kernel) + _mean_off_diagonal(y, kernel) - 2 * _mean_all(x, y, kernel)


def _mean_all(x: Tensor, y: Tensor, kernel: _Kernel) -> float:
    return sum(float(kernel(rows, y).sum()) for rows in x.split(_CHUNK)) / (len(x) * len(y))


def _mean_off_diagonal(x: Tensor, kernel: _Kernel) -> float:
    total = 0.0
    for start in range(0, len(x), _CHUNK):
        # The matrix is symmetric: a square on the diagonal, and twice what stands to the right of it.
        rows, rest = x[start : start + _CHUNK], x[start + _CHUNK :]
        square = kernel(rows, rows)
        total += float(square.sum() - square.diagonal().sum())
        if len(rest):
            total += 2 * float(kernel(rows, rest).sum())
    return total / (len(x) * (len(x) - 1))


def _subset(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]
