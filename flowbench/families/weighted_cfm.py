"""W-CFM: flow matching on independent pairs, weighted by a Gibbs kernel."""

from __future__ import annotations

from typing import Any

from flowbench.data import DataSpec
from flowbench.families.base import NetworkFactory
from flowbench.families.flow_matching import FlowMatching
from flowbench.flows import GibbsWeight, Weight

__all__ = ["WeightedCFM"]


class WeightedCFM(FlowMatching):
    """Weighted conditional flow matching: the loss of a pair counts by ``exp(-c(x0, x1) / epsilon)``.

    The weight recovers the entropic optimal-transport coupling up to a tilt of the marginals, without a solver. The
    flow then carries the source to the *tilted* data: points far from the source are rare among the samples, the more
    so the smaller epsilon. ``GibbsWeight(correction="target")`` keeps the data's law; ``"tilt-only"`` is the control
    that has W-CFM's marginals without a coupling. The training loss is weighted, so compare ``unweighted_loss``.

    The default is ``GibbsWeight()``: the Euclidean norm as cost, epsilon = 0.5 sqrt(d), divided by a running mean (the
    paper's images: kappa = 5 / sqrt(3072), raw weights), no correction. ``epsilon: elbow`` chooses on the data. In
    YAML::

        weight: {class_path: flowbench.flows.GibbsWeight, init_args: {epsilon: elbow, correction: target}}

    References:
        Calvo-Ordonez et al. (2025), Weighted Conditional Flow Matching, arXiv 2507.22270.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds the velocity network.
        weight: how much a pair counts; None is the Gibbs weight with its defaults.
        options: the other axes of :class:`FlowMatching`.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import MLP
        >>> flow = WeightedCFM(DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1))
        >>> flow.weight
        GibbsWeight(kappa=0.5, cost='norm', normalization='running', decay=0.99)
        >>> loss = flow.training_loss(Batch(torch.zeros(8, 2)), torch.Generator().manual_seed(0))
        >>> loss.total.shape, list(loss.metrics)
        (torch.Size([]), ['unweighted_loss'])
    """

    def __init__(
        self, spec: DataSpec, network: NetworkFactory, *, weight: Weight | None = None, **options: Any
    ) -> None:
        super().__init__(spec, network, weight=weight or GibbsWeight(), **options)
