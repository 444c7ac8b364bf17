"""Couplings: which source point is paired with which data point of a batch.

A coupling returns indices into the source points. Noise is permuted, never data, so labels, masks and
augmentations stay with their data point.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = [
    "Coupling",
    "IndependentCoupling",
    "OptimalTransportCoupling",
    "SinkhornCoupling",
    "sinkhorn_plan",
    "squared_distances",
]


class Coupling(ABC):
    """A rule that pairs a batch of source points with a batch of data points."""

    def __call__(self, x0: Tensor, x1: Tensor, generator: torch.Generator) -> Tensor:
        """Choose a source point for every data point.

        Args:
            x0: N source points, shape (N, *D).
            x1: B data points, shape (B, *D); every one of them is used exactly once.
            generator: source of the random draws, if the rule needs any.

        Returns:
            int64 indices into x0, shape (B,), on the device of x1: pair ``x0[index]`` with ``x1``.

        Raises:
            ValueError: if a batch is empty or the shapes of single points differ.
        """
        if x0.shape[1:] != x1.shape[1:] or not len(x0) or not len(x1):
            raise ValueError(
                f"a coupling needs non-empty batches of points of one shape, got {tuple(x0.shape)}"
                f" and {tuple(x1.shape)}"
            )
        return self._pair(x0.detach(), x1.detach(), generator).to(x1.device)

    @abstractmethod
    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator) -> Tensor: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class IndependentCoupling(Coupling):
    """The product of the two batches: pairs as drawn, without a look at the points.

    With as many source as data points each is used once and nothing is drawn; otherwise a source point is
    drawn uniformly for each data point.
    """

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator) -> Tensor:
        if len(x0) == len(x1):
            return torch.arange(len(x1))
        return torch.randint(len(x0), (len(x1),), generator=generator, device=generator.device)


class OptimalTransportCoupling(Coupling):
    """Exact minibatch optimal transport for the squared Euclidean distance.

    Batches of equal size: the optimal permutation of the source points
    (``scipy.optimize.linear_sum_assignment``, cubic in B at worst). Unequal sizes: the network simplex of
    POT, then each data point draws its source point from its column of the plan. Distances and solvers run in
    float64 on the CPU, so every device finds the same pairs.

    References:
        Tong et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772.
    """

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator) -> Tensor:
        cost = squared_distances(x0.cpu(), x1.cpu())
        if len(x0) == len(x1):
            return torch.from_numpy(linear_sum_assignment(cost.T.numpy())[1])
        return _draw_sources(_exact_plan(cost), generator)


class SinkhornCoupling(Coupling):
    """Entropic minibatch optimal transport for the squared Euclidean distance.

    Each data point draws its source point from its column of the plan, with replacement: a point may serve
    several data points, another none.

    Args:
        epsilon: regularisation relative to the mean squared distance of the batch, > 0. Towards 0 the plan is
            the exact one and needs ever more iterations; towards infinity it is the independent one.
        tolerance: largest accepted error of the source marginal, in total absolute mass (the data marginal is
            exact).
        max_iter: iterations after which the coupling gives up.

    References:
        Cuturi 2013, arXiv 1306.0895; Tong et al. 2024, arXiv 2307.03672, for its use in flow matching.
    """

    def __init__(self, epsilon: float = 0.05, tolerance: float = 1e-3, max_iter: int = 5000) -> None:
        for name, value in (("epsilon", epsilon), ("tolerance", tolerance), ("max_iter", max_iter)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.epsilon = epsilon
        self.tolerance = tolerance
        self.max_iter = max_iter

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator) -> Tensor:
        cost = squared_distances(x0, x1)
        mean = cost.mean()
        relative = cost / mean.clamp(min=torch.finfo(cost.dtype).tiny)
        return _draw_sources(sinkhorn_plan(relative, self.epsilon, self.tolerance, self.max_iter), generator)

    def __repr__(self) -> str:
        options = f"epsilon={self.epsilon:g}, tolerance={self.tolerance:g}, max_iter={self.max_iter}"
        return f"SinkhornCoupling({options})"


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared Euclidean distances in float64 between x0 (N, *D) and x1 (B, *D), shape (N, B).

    Raises:
        ValueError: if a point is not finite.
    """
    a, b = x0.flatten(1).double(), x1.flatten(1).double()
    # Distances do not feel a common shift, but the expanded square loses digits to it.
    centre = b.mean(0)
    a, b = a - centre, b - centre
    cost = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
    if not cost.isfinite().all():
        raise ValueError("a coupling met non-finite source or data points: check the data and the network's inputs")
    return cost


def sinkhorn_plan(cost: Tensor, epsilon: float, tolerance: float = 1e-3, max_iter: int = 5000) -> Tensor:
    """Entropic optimal transport plan between uniform marginals, by log-domain Sinkhorn iterations.

    Args:
        cost: float64 costs, shape (N, B).
        epsilon: regularisation in units of the cost, > 0.
        tolerance: largest accepted L1 error of the row marginal; columns sum to 1/B exactly.
        max_iter: largest number of iterations.

    Returns:
        The plan, shape (N, B).

    Raises:
        ValueError: if the rows miss their marginal by more than the tolerance after ``max_iter`` iterations.
    """
    num_rows, num_columns = cost.shape
    log_kernel = -cost / epsilon
    u = torch.zeros_like(cost[:, 0])
    error = math.inf
    for _ in range(max_iter):
        v = -math.log(num_columns) - torch.logsumexp(log_kernel + u[:, None], 0)
        update = -math.log(num_rows) - torch.logsumexp(log_kernel + v, 1)
        # exp(u - update) is the row sum of plan(u, v) times N: the convergence test costs nothing.
        error = torch.expm1(u - update).abs().mean().item()
        if error <= tolerance:
            return torch.exp(log_kernel + u[:, None] + v)
        u = update
    raise ValueError(
        f"Sinkhorn missed its marginal by {error:.2g} (tolerance {tolerance:g}) after {max_iter} iterations:"
        f" raise epsilon (now {epsilon:g}) or max_iter"
    )


def _exact_plan(cost: Tensor) -> Tensor:
    num_rows, num_columns = cost.shape
    # POT's default of 1e5 iterations stops large problems early with only a warning.
    plan, log = ot.emd(
        ot.unif(num_rows), ot.unif(num_columns), cost.contiguous().numpy(), numItermax=10_000_000, log=True
    )
    if log["warning"] is not None:
        raise RuntimeError(
            f"exact optimal transport failed on a {num_rows} x {num_columns} batch: {log['warning']};"
            " use equal batch sizes or SinkhornCoupling"
        )
    return torch.from_numpy(plan)


def _draw_sources(plan: Tensor, generator: torch.Generator) -> Tensor:
    """One row index per column, drawn with the column's probabilities."""
    cumulative = plan.T.cumsum(1)
    uniform = torch.rand(len(cumulative), generator=generator, device=generator.device, dtype=torch.float64)
    threshold = uniform.to(plan.device) * cumulative[:, -1]
    # right=True never lands on a row of probability zero.
    index = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    return index.clamp(max=len(plan) - 1)
