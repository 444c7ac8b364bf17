"""Entropic couplings: plans by log-domain Sinkhorn iterations, with kept or with relaxed marginals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_number, check_scale
from flowbench.flows.coupling.base import Coupling, CouplingCost, draw_sources, pairwise_cost

__all__ = [
    "SchrodingerBridgeCoupling",
    "SinkhornCoupling",
    "UnbalancedCoupling",
    "complete_plan",
    "sinkhorn_plan",
    "unbalanced_plan",
]

_DEFAULT_EPSILON = 0.05
# What sums of a converged plan may be off by.
_ROUNDING = 1e-6


class SinkhornCoupling(Coupling):
    """Entropic minibatch optimal transport.

    Each data point draws its source point from its column of the plan, with replacement: a point may serve
    several data points, another none.

    Args:
        epsilon: regularisation, in [1e-12, 1e12]; relative to the mean cost of the batch unless ``absolute``. None is
            0.05 where ``kappa`` is not given. Towards 0 the plan is the exact one and needs ever more iterations;
            towards infinity it is the independent one.
        tolerance: largest accepted error of the source marginal, in total absolute mass, in (0, 1] (the data marginal
            is exact).
        max_iter: iterations, >= 1, after which the coupling gives up.
        absolute: epsilon is in units of the cost, the same for every batch.
        kappa: instead of epsilon, the absolute regularisation kappa sqrt(d) in dimension d: with
            ``cost="norm"`` the entropic coupling that :class:`flowbench.flows.GibbsWeight` of the same kappa
            imitates. In [1e-12, 1e12].
        cost: "squared" for the squared Euclidean distance, "norm" for the distance.

    Raises:
        ValueError: for a value outside its range, or epsilon and kappa together.

    References:
        Cuturi 2013, arXiv 1306.0895; Tong et al. 2024, arXiv 2307.03672, for its use in flow matching.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> SinkhornCoupling(epsilon=0.01).plan(x0, x1).round(decimals=4)  # nearly the exact plan
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
        >>> SinkhornCoupling(epsilon=1e6).plan(x0, x1).round(decimals=4)  # nearly the independent one
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]], dtype=torch.float64)
        >>> SinkhornCoupling(epsilon=0.01)(x0, x1, torch.Generator().manual_seed(0))
        tensor([0, 1])
    """

    def __init__(
        self,
        epsilon: float | None = None,
        tolerance: float = 1e-3,
        max_iter: int = 5000,
        *,
        absolute: bool = False,
        kappa: float | None = None,
        cost: CouplingCost = "squared",
    ) -> None:
        if epsilon is not None and kappa is not None:
            raise ValueError(f"give epsilon or kappa, not both, got epsilon={epsilon} and kappa={kappa}")
        if absolute and epsilon is None:
            raise ValueError("absolute=True needs an epsilon in units of the cost (kappa is absolute by itself)")
        if cost not in ("squared", "norm"):
            raise ValueError(f'cost must be "squared" or "norm", got {cost!r}')
        if epsilon is None and kappa is None:
            epsilon = _DEFAULT_EPSILON
        check_scale("epsilon", epsilon, or_none=True)
        check_scale("kappa", kappa, or_none=True)
        _check_iteration(tolerance, max_iter)
        self.epsilon = epsilon
        self.tolerance = tolerance
        self.max_iter = max_iter
        self.absolute = absolute
        self.kappa = kappa
        self.cost: CouplingCost = cost

    def plan(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The entropic plan between two batches x0 (N, *D) and x1 (B, *D), shape (N, B), float64."""
        cost, epsilon = pairwise_cost(x0, x1, self.cost), self.epsilon
        if epsilon is None:
            assert self.kappa is not None
            epsilon = self.kappa * math.sqrt(x1[0].numel())
        elif not self.absolute:
            cost = cost / _mean(cost)
        return sinkhorn_plan(cost, epsilon, self.tolerance, self.max_iter)

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None) -> Tensor:
        return draw_sources(self.plan(x0, x1), generator)

    def __repr__(self) -> str:
        strength = f"epsilon={self.epsilon:g}" if self.kappa is None else f"kappa={self.kappa:g}"
        options = f"{strength}, tolerance={self.tolerance:g}, max_iter={self.max_iter}"
        options += ", absolute=True" if self.absolute else ""
        options += f", cost={self.cost!r}" if self.cost != "squared" else ""
        return f"{type(self).__name__}({options})"


class SchrodingerBridgeCoupling(SinkhornCoupling):
    """The static part of the Schroedinger bridge with diffusion sigma: the entropic plan at epsilon = 2 sigma^2.

    Squared distance, absolute epsilon; belongs to a bridge path of the same sigma. torchcfm's SB-CFM uses the
    exact plan by default.

    Args:
        sigma: diffusion coefficient of the reference process, in units of the data, in [1e-6, 1e5].
        tolerance: see :class:`SinkhornCoupling`.
        max_iter: see :class:`SinkhornCoupling`.

    References:
        Tong et al. 2024, arXiv 2302.00482 (SB-CFM) and 2307.03672.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> plan = SchrodingerBridgeCoupling(sigma=1.0).plan(x0, x1)
        >>> plan / plan[0, 0]  # off the diagonal exp(-1 / (2 sigma^2)) = 0.6065
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, sigma: float, tolerance: float = 1e-3, max_iter: int = 5000) -> None:
        # Its regularisation 2 sigma^2 has the range of every epsilon.
        check_number("sigma", sigma, at_least=1e-6, at_most=1e5)
        super().__init__(2 * sigma**2, tolerance, max_iter, absolute=True)
        self.sigma = sigma

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sigma={self.sigma:g}, tolerance={self.tolerance:g}, max_iter={self.max_iter})"


class UnbalancedCoupling(Coupling):
    """Entropic minibatch optimal transport with relaxed marginals, so that outliers are not forced to pair.

    The plan minimises cost + epsilon KL(plan | product) + penalty (KL(rows | uniform) + KL(columns |
    uniform)). What the plan leaves untransported is coupled independently: column mass that is missing to 1/B
    is spread over the source points in proportion to their own missing mass (uniformly if none misses any).
    Then each data point draws its source point from its column, with replacement. Every data point is thus
    used once, as with every coupling here: the data marginal is kept, unlike where pairs are drawn from the
    plan. The source marginal is kept up to rows and columns that carry more than their share.

    Args:
        penalty: price of a marginal's error relative to the mean squared distance of the batch, in [1e-12, 1e12].
            Towards infinity the rule is :class:`SinkhornCoupling`, towards 0 it is independent.
        epsilon: regularisation relative to the mean squared distance, in [1e-12, 1e12].
        tolerance: largest accepted change of the row masses in one iteration, in total absolute mass, in (0, 1].
        max_iter: iterations, >= 1, after which the coupling gives up.

    References:
        Chizat et al. 2018, arXiv 1607.05816; Eyring et al. 2024, arXiv 2311.15100, for its use in flow matching.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [10.0]]), torch.tensor([[10.0], [0.0]])
        >>> UnbalancedCoupling(penalty=100.0, epsilon=0.01)(x0, x1, torch.Generator().manual_seed(0))  # marginals kept
        tensor([1, 0])
        >>> UnbalancedCoupling(penalty=1e-6)(x0, x1, torch.Generator().manual_seed(0)).shape  # any pairs
        torch.Size([2])
    """

    def __init__(
        self, penalty: float = 1.0, epsilon: float = _DEFAULT_EPSILON, tolerance: float = 1e-3, max_iter: int = 5000
    ) -> None:
        check_scale("penalty", penalty)
        check_scale("epsilon", epsilon)
        _check_iteration(tolerance, max_iter)
        self.penalty = penalty
        self.epsilon = epsilon
        self.tolerance = tolerance
        self.max_iter = max_iter

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None) -> Tensor:
        cost = pairwise_cost(x0, x1, "squared")
        relative = cost / _mean(cost)
        plan = unbalanced_plan(relative, self.epsilon, self.penalty, self.tolerance, self.max_iter)
        return draw_sources(complete_plan(plan), generator)

    def __repr__(self) -> str:
        options = f"penalty={self.penalty:g}, epsilon={self.epsilon:g}, tolerance={self.tolerance:g}"
        return f"UnbalancedCoupling({options}, max_iter={self.max_iter})"


def _mean(cost: Tensor) -> float:
    """Mean cost; tiny where all points are equal, so that a division leaves zeros."""
    return max(cost.mean().item(), torch.finfo(cost.dtype).tiny)


def sinkhorn_plan(cost: Tensor, epsilon: float, tolerance: float = 1e-3, max_iter: int = 5000) -> Tensor:
    """Entropic optimal transport plan between uniform marginals, by log-domain Sinkhorn iterations.

    Args:
        cost: float64 costs, shape (N, B).
        epsilon: regularisation in units of the cost, in [1e-12, 1e12].
        tolerance: largest accepted L1 error of the row marginal, in (0, 1]; columns sum to 1/B exactly.
        max_iter: largest number of iterations, >= 1.

    Returns:
        The plan, shape (N, B).

    Raises:
        ValueError: for a number out of range; if the rows miss their marginal by more than the tolerance after
            ``max_iter`` iterations; and if the plan does, because epsilon is below what float64 resolves in the costs.
    """
    check_scale("epsilon", epsilon)
    _check_iteration(tolerance, max_iter)
    return _scaled_plan(cost, epsilon, math.inf, tolerance, max_iter)


def unbalanced_plan(
    cost: Tensor, epsilon: float, penalty: float, tolerance: float = 1e-3, max_iter: int = 5000
) -> Tensor:
    """Entropic plan with marginals held by ``penalty`` times their Kullback-Leibler divergence from uniform.

    Args:
        cost: float64 costs, shape (N, B).
        epsilon: regularisation in units of the cost, in [1e-12, 1e12], against the product of the marginals.
        penalty: price of both marginals' divergence in units of the cost, in [1e-12, 1e12].
        tolerance: largest accepted L1 change of the row masses in one iteration, relative to uniform rows, in (0, 1].
        max_iter: largest number of iterations, >= 1.

    Returns:
        The plan, shape (N, B); its mass need not be one.

    Raises:
        ValueError: as :func:`sinkhorn_plan`.
    """
    check_scale("penalty", penalty)
    check_scale("epsilon", epsilon)
    _check_iteration(tolerance, max_iter)
    return _scaled_plan(cost, epsilon, penalty, tolerance, max_iter)


def _scaled_plan(cost: Tensor, epsilon: float, penalty: float, tolerance: float, max_iter: int) -> Tensor:
    """Chizat et al. 2018, algorithm 1 in the log domain: a finite penalty damps every update."""
    num_rows, num_columns = cost.shape
    log_kernel = cost / -epsilon
    damping = 1.0 if math.isinf(penalty) else penalty / (penalty + epsilon)
    # Potentials relative to the product measure 1 / (N B).
    u = torch.zeros_like(cost[:, 0])
    error = math.inf
    for _ in range(max_iter):
        v = damping * (math.log(num_rows) - torch.logsumexp(log_kernel + u[:, None], 0))
        update = damping * (math.log(num_columns) - torch.logsumexp(log_kernel + v, 1))
        # Without damping exp(u - update) is N times the row sum of plan(u, v): the test costs nothing.
        error = torch.expm1(u - update).abs().mean().item()
        if error <= tolerance:
            plan = torch.exp(log_kernel + u[:, None] + v - math.log(num_rows * num_columns))
            rows, columns = (torch.exp(-epsilon / penalty * potential) for potential in (update, v))
            return _verified(plan, rows, columns, tolerance, epsilon, cost)
        u = update if math.isinf(penalty) else update + _mass_shift(update, v, epsilon / penalty)
    raise ValueError(
        f"Sinkhorn missed its marginal by {error:.2g} (tolerance {tolerance:g}) after {max_iter} iterations:"
        f" raise epsilon (now {epsilon:g}) or max_iter"
    )


def _verified(plan: Tensor, rows: Tensor, columns: Tensor, tolerance: float, epsilon: float, cost: Tensor) -> Tensor:
    """The plan, if it carries the masses that its potentials stand for, in shares of uniform ones.

    Potentials are as large as cost / epsilon. Where their rounding shows in the exponentials the iterations stand still
    without having converged.
    """
    num_rows, num_columns = plan.shape
    missed = torch.stack(
        [(num_rows * plan.sum(1) - rows).abs().mean(), (num_columns * plan.sum(0) - columns).abs().mean()]
    )
    # Of relaxed marginals the tolerance is relative to each mass.
    largest = max(1.0, rows.max().item(), columns.max().item())
    if not bool((missed.isfinite() & (missed <= (tolerance + _ROUNDING) * largest)).all()):
        raise ValueError(
            f"Sinkhorn's plan carries {plan.sum().item():.3g} of the mass and misses its marginals by"
            f" {missed.max().item():.2g} (tolerance {tolerance:g}): epsilon={epsilon:g} is below what float64 resolves"
            f" in costs up to {cost.max().item():.3g}, raise it"
        )
    return plan


def _check_iteration(tolerance: float, max_iter: int) -> None:
    check_number("tolerance", tolerance, above=0, at_most=1, hint="a share of the mass")
    check_count("max_iter", max_iter)


def _mass_shift(u: Tensor, v: Tensor, ratio: float) -> Tensor:
    """What to move from v to u so that both penalties agree on the mass; without it a stiff penalty takes ages.

    Sejourne et al. 2022, arXiv 2201.00730, for two equal Kullback-Leibler penalties.
    """
    mean_u = torch.logsumexp(-ratio * u, 0) - math.log(len(u))
    mean_v = torch.logsumexp(-ratio * v, 0) - math.log(len(v))
    return (mean_u - mean_v) / (2 * ratio)


def complete_plan(plan: Tensor) -> Tensor:
    """A partial plan (N, B) plus the independent coupling of what it leaves: columns sum to at least 1/B.

    Rows and columns with at most uniform mass end with exactly uniform mass if none carries more.
    """
    num_rows, num_columns = plan.shape
    rows = (1 / num_rows - plan.sum(1)).clamp(min=0)
    columns = (1 / num_columns - plan.sum(0)).clamp(min=0)
    missing = rows.sum()
    share = rows / missing if missing > 0 else torch.full_like(rows, 1 / num_rows)
    return plan + share[:, None] * columns
