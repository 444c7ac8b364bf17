"""Held-out images on their way through a flow's autoencoder."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from flowbench.evaluation.probe import Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule, LatentSpace

__all__ = ["held_out_batches", "is_latent"]


def held_out_batches(flow: FlowModule, setup: Setup, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """This process's share of the first `num` held-out images.

    Args:
        flow: on whose device they are wanted.
        setup: the data, and how many at a time.
        num: how many over all processes.

    Yields:
        Indices (B,), images in model space (B, *D), and the labels (B,) that the flow is given, or None.
    """
    data, split = setup.data, setup.held_out.name
    labels = None if flow.num_classes is None else data.split(split).label
    for chunk in setup.batches(setup.shard(num)):
        x = data.model_values(split, chunk).to(flow.device)
        yield chunk, x, None if labels is None else labels[chunk].to(flow.device)


def is_latent(who: Prospect) -> bool:
    """Whether somebody is a flow on the latents of an autoencoder."""
    return isinstance(who.module, FlowModule) and isinstance(who.module.space, LatentSpace)
