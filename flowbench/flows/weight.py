"""Weights: how much a pair of a source and a data point counts in the loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, distributed, nn

__all__ = ["Cost", "GibbsWeight", "Normalization", "UniformWeight", "Weight", "WeightResult", "marginal_tilt"]

Cost = Literal["norm", "squared"]
Normalization = Literal["running", "batch", "raw"]


@dataclass(frozen=True)
class WeightResult:
    """Weights of a batch of pairs.

    Attributes:
        weight: shape (B,), >= 0, without gradient.
        diagnostics: named scalars of this batch (this process's share of it) to log.
    """

    weight: Tensor
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


class Weight(nn.Module, ABC):
    """A weight for each pair, given its two ends."""

    @abstractmethod
    def forward(self, x0: Tensor, x1: Tensor) -> WeightResult:
        """Weights of the pairs (x0[i], x1[i]); both of shape (B, *D)."""


class UniformWeight(Weight):
    """Every pair counts the same: plain flow matching."""

    def forward(self, x0: Tensor, x1: Tensor) -> WeightResult:
        """Weights of one."""
        return WeightResult(torch.ones(len(x1), device=x1.device))


class GibbsWeight(Weight):
    """The Gibbs weight ``exp(-c(x0, x1) / epsilon)`` of weighted flow matching.

    With epsilon = kappa sqrt(d) in dimension d, it imitates an entropic coupling on independent pairs at
    linear cost, but tilts both marginals on the way: watch ``ess`` and :func:`marginal_tilt`. Raw weights are
    around 4e-6 on CIFAR-10 at epsilon = 5 (an estimate), which gradient clipping and Adam's epsilon both
    feel; a constant factor does not change the optimal velocity, so the default divides by a running mean.

    Diagnostics: ``ess``, the effective sample size over B, in (0, 1]; ``max_share``, the largest weight over
    their sum; ``weighted_cost`` and ``unweighted_cost``, the mean cost c with and without the weights.

    Args:
        kappa: temperature per square root of the dimension, > 0; the paper's CIFAR-10 setting is 5 /
            sqrt(3072).
        cost: "norm" for the Euclidean distance (the paper), "squared" for its square.
        normalization: "running" divides by a moving average of the batches' log-mean-exp, taken over earlier
            batches so that the gradient stays unbiased up to a constant factor (the first batch divides by
            its own); "batch" divides by this batch's mean, of order 1/B bias; "raw" divides by nothing.
            Means are taken over all processes when torch.distributed is initialised.
        decay: decay of the moving average per training batch, in (0, 1), with bias-corrected warm-up. The
            average is part of the state dict and is frozen in eval mode.

    References:
        Calvo-Ordonez et al. 2025, arXiv 2507.22270 (W-CFM).
    """

    running_log_mean: Tensor
    num_updates: Tensor

    def __init__(
        self,
        kappa: float = 0.5,
        cost: Cost = "norm",
        normalization: Normalization = "running",
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if not (kappa > 0 and math.isfinite(kappa)):
            raise ValueError(f"kappa must be positive and finite, got {kappa}: use UniformWeight for no weight")
        if cost not in ("norm", "squared"):
            raise ValueError(f'cost must be "norm" or "squared", got {cost!r}')
        if normalization not in ("running", "batch", "raw"):
            raise ValueError(f'normalization must be "running", "batch" or "raw", got {normalization!r}')
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {decay}")
        self.kappa = kappa
        self.cost: Cost = cost
        self.normalization: Normalization = normalization
        self.decay = decay
        self.register_buffer("running_log_mean", torch.zeros(()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def epsilon(self, num_dims: int) -> float:
        """Temperature for points of ``num_dims`` dimensions."""
        return self.kappa * math.sqrt(num_dims)

    @torch.no_grad()
    def forward(self, x0: Tensor, x1: Tensor) -> WeightResult:
        """Gibbs weights of the pairs (x0[i], x1[i]), computed in log space in at least float32.

        Raises:
            ValueError: if the two batches differ in shape.
        """
        if x0.shape != x1.shape:
            raise ValueError(f"pairs must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
        cost = _cost(_flat(x0) - _flat(x1), self.cost)
        log_weight = -cost / self.epsilon(x1[0].numel())
        weight = (log_weight - self._log_normalizer(log_weight)).exp()
        return WeightResult(weight, _diagnostics(log_weight, cost))

    def _log_normalizer(self, log_weight: Tensor) -> Tensor:
        if self.normalization == "raw":
            return torch.zeros_like(log_weight[0])
        log_mean = _global_log_mean_exp(log_weight)
        if self.normalization == "batch":
            return log_mean
        normalizer = torch.where(self.num_updates > 0, self.running_log_mean.to(log_mean), log_mean)
        if self.training:
            self._update(log_mean)
        return normalizer

    def _update(self, log_mean: Tensor) -> None:
        self.num_updates += 1
        # (1 - decay) / (1 - decay^n): the step that keeps the average bias-corrected at every n.
        rate = (self.decay - 1) / torch.expm1(self.num_updates * math.log(self.decay))
        self.running_log_mean += rate * (log_mean - self.running_log_mean)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        options = f"kappa={self.kappa:g}, cost={self.cost!r}, normalization={self.normalization!r}"
        return f"{options}, decay={self.decay:g}"


@torch.no_grad()
def marginal_tilt(x0: Tensor, x1: Tensor, epsilon: float, cost: Cost = "norm") -> tuple[Tensor, Tensor]:
    """How unevenly the Gibbs weight counts source and data points: the bias of weighted flow matching.

    The weight keeps a marginal iff its mean weight per point is constant. This estimates the squared
    coefficient of variation (variance over squared mean) of that mean weight over the points of each side. It
    costs O(N B d) time and O(N B) memory: call it on a few thousand points at a time, not in every step.

    Args:
        x0: source points, shape (N, *D).
        x1: data points, shape (B, *D).
        epsilon: temperature of the weight, > 0.
        cost: "norm" or "squared", as in :class:`GibbsWeight`.

    Returns:
        Squared coefficients of variation of the source and of the data, two scalars >= 0.
    """
    a, b = _flat(x0), _flat(x1)
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    log_weight = -(distance if cost == "norm" else distance.square()) / epsilon
    source, data = (_squared_variation(torch.logsumexp(log_weight, dim)) for dim in (1, 0))
    return source, data


def _flat(x: Tensor) -> Tensor:
    return x.detach().flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def _cost(difference: Tensor, cost: Cost) -> Tensor:
    return difference.norm(dim=1) if cost == "norm" else difference.square().sum(1)


def _global_log_mean_exp(log_weight: Tensor) -> Tensor:
    """Log of the mean of exp over the batch, and over all processes, whose batches may differ in size."""
    total, count = torch.logsumexp(log_weight, 0), len(log_weight)
    if not (distributed.is_available() and distributed.is_initialized()):
        return total - math.log(count)
    largest = total.clone()
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    sums = torch.stack([(total - largest).exp(), total.new_tensor(count)])
    distributed.all_reduce(sums)
    return largest + (sums[0] / sums[1]).log()


def _diagnostics(log_weight: Tensor, cost: Tensor) -> dict[str, Tensor]:
    share = log_weight.softmax(0)
    return {
        "ess": (1 / (len(share) * share.square().sum())).clamp(max=1),
        "max_share": share.max(),
        "weighted_cost": (share * cost).sum(),
        "unweighted_cost": cost.mean(),
    }


def _squared_variation(log_values: Tensor) -> Tensor:
    share = log_values.softmax(0)
    return (len(share) * share.square().sum() - 1).clamp(min=0)
