"""What a weight does to the marginals and to the transport cost, measured on samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.flows.weight.base import Weight
from flowbench.flows.weight.cost import COSTS, Cost, cost_matrix, flat_points

__all__ = [
    "TransportDecomposition",
    "effective_share",
    "squared_variation",
    "tilts",
    "transport_decomposition",
]


def squared_variation(log_values: Tensor) -> Tensor:
    """Squared coefficient of variation, >= 0, of N positive numbers given by their logarithms, shape (N,)."""
    share = log_values.softmax(0)
    return (len(share) * share.square().sum() - 1).clamp(min=0)


def tilts(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`squared_variation` of the row and of the column means of weights, given by their logarithms (N, M)."""
    # One exponential for both: a row that underflows beside the largest entry would have no share of a sum either.
    share = log_weight.flatten().softmax(0).view_as(log_weight)
    moments = (torch.var_mean(share.sum(dim), correction=0) for dim in (1, 0))
    source, target = (variance / mean.square() for variance, mean in moments)
    return source, target


def effective_share(log_weight: Tensor) -> Tensor:
    """Effective sample size over the number of weights, (sum w)^2 / (N sum w^2), in (0, 1]; logarithms, shape (N,)."""
    share = log_weight.softmax(0)
    return (1 / (len(share) * share.square().sum())).clamp(max=1)


@dataclass(frozen=True)
class TransportDecomposition:
    """How much of the drop in transport cost the tilted marginals alone explain.

    The three mean costs are over all pairs of a source and a data sample, under the product of the samples, under the
    product of the *tilted* samples (weight f(x) g(y), no coupling), and under the weight itself. f(x) and g(y) are the
    mean weights of a point.

    Attributes:
        independent: mean transport cost of independent pairs.
        tilt_only: mean transport cost with the weight f(x) g(y).
        weighted: mean transport cost with the weight.
        tilt_share: (independent - tilt_only) / (independent - weighted); 1 means that the weight is importance
            weighting and nothing else, 0 that it only couples. NaN where the weight does not lower the cost.
        ess: effective sample size of the weights over the number of pairs, in (0, 1].
        tilt_source: squared coefficient of variation of f over the source sample, >= 0.
        tilt_target: that of g over the data sample, >= 0.
        weighted_norm_ratio: mean norm of the data as weighted over their mean norm; NaN where all lie at the origin.
        sd_source: standard deviation over the source sample of the log-weight's mean (two-way analysis of variance:
            log w = constant + source part + data part + interaction).
        sd_target: that over the data sample.
        sd_interaction: standard deviation of what is left, the part of the log-weight that couples. The three are NaN
            for a weight that is zero for some pairs.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> split = transport_decomposition(GibbsWeight(epsilon=1.0), x0, x1)
        >>> split.independent, round(split.weighted, 4)  # mean squared distance, and w / (1 + w) with w = exp(-1)
        (0.5, 0.2689)
        >>> abs(split.tilt_share) < 1e-6  # both points count the same: the weight only couples
        True
    """

    independent: float
    tilt_only: float
    weighted: float
    tilt_share: float
    ess: float
    tilt_source: float
    tilt_target: float
    weighted_norm_ratio: float
    sd_source: float
    sd_target: float
    sd_interaction: float


@torch.no_grad()
def transport_decomposition(
    weight: Weight, x0: Tensor, x1: Tensor, *, transport_cost: Cost = "squared", chunk: int = 512
) -> TransportDecomposition:
    """Split the drop in transport cost under a weight into tilt and coupling.

    Sums run over all N x M pairs in float64, ``chunk`` source points at a time: O(chunk M) memory, two passes of
    O(N M d) time. Two thousand points a side give the share to a few per cent.

    Args:
        weight: fitted, where it needs to be; its normalisation plays no part.
        x0: source points, shape (N, *D).
        x1: data points, shape (M, *D).
        transport_cost: the cost that is averaged, "squared" (as W2 and path energy are) or "norm".
        chunk: source points held against all data points at once, >= 1.

    Raises:
        ValueError: for a chunk that is not positive, an unknown cost, a weight that is not fitted, points of two
            shapes, or points that are not finite.
    """
    if x0.shape[1:] != x1.shape[1:] or not len(x0) or not len(x1):
        raise ValueError(
            f"source and data must be non-empty samples of points of one shape, got {tuple(x0.shape)}"
            f" and {tuple(x1.shape)}"
        )
    if transport_cost not in COSTS:
        raise ValueError(f'transport_cost must be "norm" or "squared", got {transport_cost!r}')
    check_count("chunk", chunk)
    if not (x0.isfinite().all() and x1.isfinite().all()):
        raise ValueError("the decomposition met points that are not finite: check the source and the data")
    x0, x1 = x0.double(), x1.double()
    marginals = _marginals(weight, x0, x1, chunk)
    independent, tilt_only, weighted = _mean_costs(weight, x0, x1, transport_cost, chunk, marginals)
    drop = independent - weighted
    norm = flat_points(x1).norm(dim=1)
    return TransportDecomposition(
        independent=independent,
        tilt_only=tilt_only,
        weighted=weighted,
        # Below the rounding of the sums there is no drop to share out.
        tilt_share=(independent - tilt_only) / drop if drop > 1e-12 * independent else math.nan,
        ess=min(1.0, math.exp(2 * marginals.log_total - marginals.log_total_square - math.log(len(x0) * len(x1)))),
        tilt_source=squared_variation(marginals.log_source).item(),
        tilt_target=squared_variation(marginals.log_target).item(),
        weighted_norm_ratio=((marginals.log_target.softmax(0) @ norm) / norm.mean()).item(),
        sd_source=marginals.sd_source,
        sd_target=marginals.sd_target,
        sd_interaction=marginals.sd_interaction,
    )


@dataclass(frozen=True)
class _Marginals:
    """Sums of a weight's rows and columns, as logarithms, and the parts of its log-weights' variance."""

    log_source: Tensor
    log_target: Tensor
    log_total: float
    log_total_square: float
    sd_source: float
    sd_target: float
    sd_interaction: float


def _log_weights(weight: Weight, x0: Tensor, x1: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x0), chunk):
        rows = slice(start, min(start + chunk, len(x0)))
        yield rows, weight.log_weight_matrix(x0[rows], x1).double()


def _marginals(weight: Weight, x0: Tensor, x1: Tensor, chunk: int) -> _Marginals:
    log_source, row_mean = x0.new_empty(len(x0)), x0.new_empty(len(x0))
    log_target, column_sum = x1.new_full((len(x1),), -math.inf), x1.new_zeros(len(x1))
    # Variances are sums about a value near the mean: about zero they would lose the digits that matter.
    pivot = weight.log_weight_matrix(x0[:1], x1).double().mean()
    log_square, square = torch.full_like(pivot, -math.inf), torch.zeros_like(pivot)
    for rows, log_weight in _log_weights(weight, x0, x1, chunk):
        log_source[rows] = torch.logsumexp(log_weight, 1)
        log_target = torch.logaddexp(log_target, torch.logsumexp(log_weight, 0))
        log_square = torch.logaddexp(log_square, torch.logsumexp(2 * log_weight.flatten(), 0))
        log_weight -= pivot
        row_mean[rows] = log_weight.mean(1)
        column_sum += log_weight.sum(0)
        square += log_weight.square().sum()
    column_mean, total_variance = column_sum / len(x0), square / (len(x0) * len(x1)) - row_mean.mean() ** 2
    variances = row_mean.var(correction=0), column_mean.var(correction=0)
    return _Marginals(
        log_source=log_source,
        log_target=log_target,
        log_total=torch.logsumexp(log_source, 0).item(),
        log_total_square=log_square.item(),
        sd_source=variances[0].sqrt().item(),
        sd_target=variances[1].sqrt().item(),
        sd_interaction=(total_variance - variances[0] - variances[1]).clamp(min=0).sqrt().item(),
    )


def _mean_costs(
    weight: Weight, x0: Tensor, x1: Tensor, transport_cost: Cost, chunk: int, marginals: _Marginals
) -> tuple[float, float, float]:
    """Mean transport costs of independent, tilted and weighted pairs."""
    source, target = marginals.log_source.softmax(0), marginals.log_target.softmax(0)
    a, b = flat_points(x0), flat_points(x1)
    sums = a.new_zeros(3)
    for rows, log_weight in _log_weights(weight, x0, x1, chunk):
        transport = cost_matrix(a[rows], b, transport_cost)
        sums[0] += transport.mean(1).sum() / len(a)
        sums[1] += source[rows] @ (transport @ target)
        sums[2] += ((log_weight - marginals.log_total).exp_() * transport).sum()
    independent, tilt_only, weighted = sums.tolist()
    return independent, tilt_only, weighted
