"""Optimal transport that uses conditions, so that noise stays independent of what it is conditioned on."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from flowbench.core.checks import check_number
from flowbench.flows.coupling.assignment import assign
from flowbench.flows.coupling.base import Coupling, squared_distances

__all__ = ["ConditionDistance", "ConditionalCoupling", "condition_weight"]

ConditionDistance = Literal["cosine", "squared"]


class ConditionalCoupling(Coupling):
    """Exact minibatch optimal transport with a price on changing the condition (C2OT).

    Pairing by distance alone makes the noise of a data point depend on its condition, while at sampling time
    noise is drawn independently of it. Here noise i carries the condition that came with row i, and pairing
    it with data point j costs |x0_i - x1_j|^2 + w D(c_i, c_j).

    Integer labels (B,) are matched only within their class (w infinite): given its label, a data point's
    source is distributed exactly as the source, because a class's noise is permuted by itself. Real
    conditions (B, *K) are softer: the larger w, the closer to that. Both batches need one size.

    Args:
        weight: w in [0, 1e12] for real conditions, in units of squared data distance per unit of D.
        target_ratio: in [0, 1), instead of a weight: per batch the smallest w that leaves at most this share
            of the pairs (i, j), i != j, cheaper than (j, j), see :func:`condition_weight`. The default is
            0.01 where no weight is given.
        distance: D, "cosine" for one minus the cosine similarity, "squared" for the squared Euclidean distance.

    Raises:
        ValueError: for a value out of range, or weight and target_ratio together.

    References:
        Cheng and Schwing 2025, arXiv 2503.10636 (C2OT).

    Example:
        >>> x0 = torch.tensor([[0.0], [1.0], [2.0]])
        >>> x1, label = torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([0, 0, 1])
        >>> OptimalTransportCoupling()(x0, x1, torch.Generator())  # distance alone
        tensor([2, 1, 0])
        >>> ConditionalCoupling()(x0, x1, torch.Generator(), label)  # within each label: source point 2 has label 1
        tensor([1, 0, 2])
    """

    def __init__(
        self,
        weight: float | None = None,
        target_ratio: float | None = None,
        distance: ConditionDistance = "cosine",
    ) -> None:
        if weight is not None and target_ratio is not None:
            raise ValueError(f"give weight or target_ratio, not both, got {weight} and {target_ratio}")
        check_number("weight", weight, at_least=0, or_none=True)
        check_number("target_ratio", target_ratio, at_least=0, below=1, or_none=True)
        if distance not in ("cosine", "squared"):
            raise ValueError(f'distance must be "cosine" or "squared", got {distance!r}')
        self.weight = weight
        self.target_ratio = 0.01 if weight is None and target_ratio is None else target_ratio
        self.distance: ConditionDistance = distance

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None) -> Tensor:
        condition = _checked(condition, len(x0), len(x1)).cpu()
        x0, x1 = x0.cpu(), x1.cpu()
        if condition.is_floating_point():
            return self._by_distance(x0, x1, condition)
        return _by_class(x0, x1, condition)

    def _by_distance(self, x0: Tensor, x1: Tensor, condition: Tensor) -> Tensor:
        cost, price = squared_distances(x0, x1), _condition_distances(condition, self.distance)
        weight = self.weight
        if weight is None:
            assert self.target_ratio is not None
            weight = condition_weight(cost, price, self.target_ratio)
        return assign(cost + weight * price)

    def __repr__(self) -> str:
        strength = f"target_ratio={self.target_ratio}" if self.weight is None else f"weight={self.weight:g}"
        return f"ConditionalCoupling({strength}, distance={self.distance!r})"


def condition_weight(cost: Tensor, price: Tensor, target_ratio: float) -> float:
    """The smallest weight w >= 0 that keeps most pairs from beating the diagonal.

    Pair (i, j), i != j, beats it where ``cost[i, j] + w price[i, j] < cost[j, j]``. Every pair stops at its
    own w, so the weight is an order statistic of those: no search.

    Args:
        cost: shape (B, B).
        price: distances between the conditions, shape (B, B), >= 0, zero on the diagonal.
        target_ratio: largest share of the B (B - 1) pairs that may beat the diagonal, in [0, 1). Pairs of
            equal conditions that beat it do so at every w; where they alone are more, the weight is the
            smallest that leaves only them.

    Returns:
        The weight.

    Raises:
        ValueError: for a ratio out of range.
    """
    check_number("target_ratio", target_ratio, at_least=0, below=1)
    num = len(cost)
    if num < 2:
        return 0.0
    gain = cost.diagonal() - cost
    paid = (price > 0) & (gain > 0)
    limits = (gain[paid] / price[paid]).sort(descending=True).values
    unpaid = int(((price <= 0) & (gain > 0)).sum())
    allowed = max(0, math.floor(target_ratio * num * (num - 1)) - unpaid)
    return limits[allowed].item() if allowed < len(limits) else 0.0


def _checked(condition: Tensor | None, num_source: int, num_data: int) -> Tensor:
    if condition is None:
        raise ValueError("ConditionalCoupling needs the conditions of the batch: use OptimalTransportCoupling without")
    if not num_source == num_data == len(condition):
        raise ValueError(
            "ConditionalCoupling needs one condition and one source point per data point, got"
            f" {len(condition)} conditions, {num_source} source and {num_data} data points"
        )
    if not condition.is_floating_point() and condition.ndim != 1:
        raise ValueError(f"integer conditions are labels of shape (B,), got {tuple(condition.shape)}: use real vectors")
    if not condition.isfinite().all():
        raise ValueError("ConditionalCoupling met a non-finite condition: check the data's conditions")
    return condition


def _by_class(x0: Tensor, x1: Tensor, label: Tensor) -> Tensor:
    index = torch.empty(len(x1), dtype=torch.int64)
    for value in label.unique():
        rows = (label == value).nonzero().squeeze(1)
        index[rows] = rows[assign(squared_distances(x0[rows], x1[rows]))]
    return index


def _condition_distances(condition: Tensor, distance: ConditionDistance) -> Tensor:
    vectors = condition.reshape(len(condition), -1).double()
    if distance == "cosine":
        # Half the squared distance of unit vectors is one minus their cosine.
        vectors = functional.normalize(vectors, dim=1) / 2**0.5
    # By a matrix product equal vectors come out only nearly equal, which a large weight would blow up.
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
