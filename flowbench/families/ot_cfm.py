"""OT-CFM: flow matching on minibatch optimal-transport pairs."""

from __future__ import annotations

from typing import Any

from flowbench.data import DataSpec
from flowbench.families.base import NetworkFactory
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.pairing.base import Pairing
from flowbench.flows import Coupling, OptimalTransportCoupling

__all__ = ["OTCFM"]


class OTCFM(FlowMatching):
    """Flow matching with the exact minibatch optimal-transport coupling.

    Pairs are found inside each process's share of a micro-batch, so the number of processes and the accumulation of
    gradients change the coupling; a :class:`~flowbench.families.pairing.stream.StreamPairing` couples several batches
    of all processes at once. The default does not look at labels: given its label, a data point's source is no longer
    distributed as the source that a conditional sampler draws from (arXiv 2503.10636), which
    :class:`~flowbench.flows.ConditionalCoupling` mends.

    References:
        Tong et al. (2024), Improving and Generalizing Flow-Based Generative Models, arXiv 2302.00482, sec. 3.2.
        Pooladian et al. (2023), Multisample Flow Matching, arXiv 2304.14772.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds the velocity network.
        coupling: pairs source with data inside the batch; None is the exact assignment.
        pairing: a rule in place of the coupling, such as StreamPairing.
        options: the other axes of :class:`FlowMatching`.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import MLP
        >>> flow = OTCFM(DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1))
        >>> flow.pairing
        BatchPairing(OptimalTransportCoupling())
        >>> flow.training_loss(Batch(torch.zeros(8, 2)), torch.Generator().manual_seed(0)).total.shape
        torch.Size([])
    """

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        coupling: Coupling | None = None,
        pairing: Pairing | None = None,
        **options: Any,
    ) -> None:
        if coupling is None and pairing is None:
            coupling = OptimalTransportCoupling()
        super().__init__(spec, network, coupling=coupling, pairing=pairing, **options)
