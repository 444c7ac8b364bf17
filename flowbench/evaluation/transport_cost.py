"""The squared W2 distance between a flow's source and its data, which its path energy is compared with."""

from __future__ import annotations

import torch

from flowbench.core.seeds import derive_seed
from flowbench.data import FlowDataModule
from flowbench.data.reference_transport import STANDARD_NORMAL, reference_transport
from flowbench.families import DatasetSource, FlowModule
from flowbench.metrics import wasserstein2_squared

__all__ = ["transport_cost"]

# Points on either side where there is no fixed reference.
TRANSPORT_POINTS = 2048


def transport_cost(flow: FlowModule, data: FlowDataModule, seed: int) -> tuple[float | None, str]:
    """Squared W2 between source and data, summed over dimensions, and where the number comes from.

    Args:
        flow: whose source.
        data: the data.
        seed: the evaluation seed, which keys the source's points where there is no fixed reference.

    Returns:
        The number and ``reference`` or ``2048-points``; None for images: in many dimensions an estimate is mostly bias.
    """
    if flow.spec.modality != "vector":
        return None, ""
    known = reference_transport(_source_name(flow), flow.spec)
    if known is not None:
        return known.w2_squared, "reference"
    real = data.model_values("train", slice(TRANSPORT_POINTS))
    noise = flow.draw_noise(torch.arange(len(real)), derive_seed(seed, "transport"))
    return wasserstein2_squared(noise.cpu(), real), f"{len(real)}-points"


def _source_name(flow: FlowModule) -> str:
    """The name under which the transport from the flow's source is known; empty where it has none."""
    source = flow.sampling_source or flow.source
    if isinstance(source, DatasetSource):
        return source.dataset
    return STANDARD_NORMAL if source.is_standard_normal else ""
