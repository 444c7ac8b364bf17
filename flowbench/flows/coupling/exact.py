"""Couplings: which source point is paired with which data point of a batch.

A coupling returns indices into the source points. Noise is permuted, never data, so labels, masks and
augmentations stay with their data point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.lazy import lazy_module
from flowbench.core.no_solution import NoSolutionError
from flowbench.flows.coupling.assignment import assign
from flowbench.flows.coupling.base import Coupling, draw_sources, squared_distances

ot = lazy_module("ot")  # only some couplings need it, and it takes most of a second

__all__ = [
    "IndependentCoupling",
    "OptimalTransportCoupling",
]


class IndependentCoupling(Coupling):
    """Independent pairs: source and data points are paired in the order in which they were drawn.

    With as many source as data points each is used once and nothing is drawn; otherwise a source point is
    drawn uniformly for each data point.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.9], [0.1], [1.2]])
        >>> IndependentCoupling()(x0, x1, torch.Generator())
        tensor([0, 1, 2])
    """

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None) -> Tensor:
        if len(x0) == len(x1):
            return torch.arange(len(x1), device=x1.device)
        return torch.randint(len(x0), (len(x1),), generator=generator, device=generator.device)


class OptimalTransportCoupling(Coupling):
    """Exact minibatch optimal transport for the squared Euclidean distance.

    Batches of equal size: the optimal permutation of the source points
    (:func:`flowbench.flows.coupling.assignment.assign`). Unequal sizes: the network simplex of POT, then each data
    point draws its source point from its column of the plan. Distances are taken and problems solved on the
    CPU, so every device finds the same pairs. The rule ignores conditions: given its condition, a data
    point's source is no longer distributed as the source (see ``ConditionalCoupling``).

    References:
        Tong et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.9], [0.1], [1.2]])
        >>> index = OptimalTransportCoupling()(x0, x1, torch.Generator())
        >>> index, x0[index].flatten()  # on a line both ends are in the same order
        (tensor([2, 0, 1]), tensor([2., 0., 1.]))
    """

    def _pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator, condition: Tensor | None) -> Tensor:
        cost = squared_distances(x0.cpu(), x1.cpu())
        if len(x0) == len(x1):
            return assign(cost)
        return draw_sources(_exact_plan(cost), generator)


def _exact_plan(cost: Tensor) -> Tensor:
    num_rows, num_columns = cost.shape
    # POT's default of 1e5 iterations stops large problems early with only a warning.
    plan, log = ot.emd(
        ot.unif(num_rows), ot.unif(num_columns), cost.contiguous().numpy(), numItermax=10_000_000, log=True
    )
    if log["warning"] is not None:
        raise NoSolutionError(
            f"exact optimal transport failed on a {num_rows} x {num_columns} batch: {log['warning']};"
            " use equal batch sizes or SinkhornCoupling"
        )
    return torch.from_numpy(plan)
