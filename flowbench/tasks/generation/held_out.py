"""Held-out images on their way through a flow's autoencoder."""

from __future__ import annotations

from collections.abc import Iterator

from flowbench.data import Batch
from flowbench.evaluation.probe import Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule, LatentSpace

__all__ = ["held_out_batches", "is_latent"]


def held_out_batches(flow: FlowModule, setup: Setup, num: int) -> Iterator[Batch]:
    """This process's share of the first `num` held-out images.

    Args:
        flow: on whose device they are wanted.
        setup: the data, and how many at a time.
        num: how many over all processes.

    Yields:
        Images in model space on the flow's device, with their labels, conditions and numbers.
    """
    data, split = setup.data, setup.held_out.name
    labels = data.split(split).label
    for chunk in setup.batches(setup.shard(num)):
        x = data.model_values(split, chunk).to(flow.device)
        label = None if labels is None else labels[chunk].to(flow.device)
        yield Batch(x, label, data.conditions(split, chunk), chunk)


def is_latent(who: Prospect) -> bool:
    """Whether somebody is a flow on the latents of an autoencoder."""
    return isinstance(who.module, FlowModule) and isinstance(who.module.space, LatentSpace)
