"""Partial optimal transport: only a fraction of each batch is paired optimally."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowbench.core.checks import check_number
from flowbench.core.lazy import lazy_module
from flowbench.core.no_solution import NoSolutionError
from flowbench.flows.coupling.assignment import assign
from flowbench.flows.coupling.base import Coupling, draw_sources, squared_distances
from flowbench.flows.coupling.entropic import complete_plan

ot = lazy_module("ot")  # only some couplings need it, and it takes most of a second

__all__ = ["PartialCoupling"]


class PartialCoupling(Coupling):
    """Optimal pairs for the fraction of the mass that is cheapest to pair, independent pairs for the rest.

    Which points belong to the fraction is part of the optimisation, so points far from the other batch are
    left out of it. The rest is coupled independently: both marginals are kept, unlike where pairs are drawn
    from the partial plan. Batches of equal size: the cheapest ``mass * B`` pairs (rounded, at least one), then
    a random permutation of the other points; every source point is used once. Unequal sizes: POT's plan,
    completed by the product of what it leaves, from whose columns each data point draws its source point.

    Args:
        mass: fraction in (0, 1]; 1 is :class:`flowbench.flows.coupling.exact.OptimalTransportCoupling`.

    References:
        Figalli 2010, doi 10.1007/s00205-008-0212-7; Chapel et al. 2020, arXiv 2002.08276 (partial transport
        as balanced transport with dummy points).

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[100.0], [1.0], [2.0]])
        >>> OptimalTransportCoupling()(x0, x1, torch.Generator())  # the outlier moves all pairs
        tensor([2, 0, 1])
        >>> PartialCoupling(mass=2 / 3)(x0, x1, torch.Generator())  # it gets the source point that is left
        tensor([0, 1, 2])
    """

    def __init__(self, mass: float = 0.9) -> None:
        check_number("mass", mass, above=0, at_most=1)
        self.mass = mass

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None) -> Tensor:
        cost = squared_distances(x0.cpu(), x1.cpu())
        if len(x0) != len(x1):
            return draw_sources(complete_plan(_partial_plan(cost, self.mass)), generator)
        num_pairs = max(1, round(self.mass * len(x1)))
        index = _partial_assignment(cost, num_pairs)
        rest = (index < 0).nonzero().squeeze(1)
        unused = torch.ones(len(x0), dtype=torch.bool)
        unused[index[index >= 0]] = False
        order = torch.randperm(len(rest), generator=generator, device=generator.device).cpu()
        index[rest] = unused.nonzero().squeeze(1)[order]
        return index

    def __repr__(self) -> str:
        return f"PartialCoupling(mass={self.mass:g})"


def _partial_assignment(cost: Tensor, num_pairs: int) -> Tensor:
    """Row of every column in the cheapest ``num_pairs`` disjoint pairs; -1 for columns left out."""
    num = len(cost)
    size = 2 * num - num_pairs
    # Points and dummies are spread evenly: the solver is fast where all parts of a problem are alike.
    points = torch.arange(num) * size // num
    point_of = torch.full((size,), -1)
    point_of[points] = torch.arange(num)
    dummies = (point_of < 0).nonzero().squeeze(1)
    extended = cost.new_zeros(size, size)
    extended[points[:, None], points] = cost
    # A dummy that serves a dummy would let one more real pair in; at this price it never pays.
    extended[dummies[:, None], dummies] = 2 * cost.max() + 1
    return point_of[assign(extended)[points]]


def _partial_plan(cost: Tensor, mass: float) -> Tensor:
    num_rows, num_columns = cost.shape
    plan = ot.partial.partial_wasserstein(
        ot.unif(num_rows), ot.unif(num_columns), cost.numpy(), m=mass, numItermax=10_000_000
    )
    if not math.isclose(plan.sum(), mass, rel_tol=1e-6):
        raise NoSolutionError(
            f"partial transport moved {plan.sum():.3g} of the mass instead of {mass:g}: use equal batch sizes"
        )
    return torch.from_numpy(plan)
