"""Labels and conditions of the samples that a measurement draws, by the sample's index."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flowbench.core.seeds import derive_seed
from flowbench.evaluation.probe import Setup
from flowbench.families.conditioning.base import Conditioner
from flowbench.families.conditioning.condition import Condition
from flowbench.families.latents.space import Space

__all__ = ["condition_at", "condition_rows", "labels_of_samples"]


class Conditioned(Protocol):
    """What is needed of a flow."""

    num_classes: int | None
    conditioner: Conditioner | None
    space: Space

    @property
    def device(self) -> torch.device:
        """Where its samples are drawn."""

    def labels_of_samples(self, setup: Setup) -> Tensor | None:
        """Labels that the samples 0, 1, ... are given."""


def condition_rows(setup: Setup, index: Tensor) -> Tensor:
    """The held-out image of each sample: they take turns."""
    return index % len(setup.data.split(setup.held_out.name))


def condition_at(flow: Conditioned, setup: Setup, index: Tensor) -> Condition:
    """What the samples at some indices are conditioned on.

    On the grid sample i is given what image i (modulo their number) shows. Masks are keyed by the sample's index, so an
    image that comes again has another one.

    Args:
        flow: whose samples.
        setup: the data, of which the held-out split gives the images, and the evaluation seed.
        index: sample indices below ``setup.num_samples``, shape (B,).
    """
    labels = flow.labels_of_samples(setup)
    label = None if labels is None else labels[index].to(flow.device)
    if flow.conditioner is None:
        return Condition(label)
    split, rows = setup.held_out.name, condition_rows(setup, index)
    x, given = setup.data.model_values(split, rows).to(flow.device), setup.data.conditions(split, rows)
    return Condition(label, flow.conditioner.held_out_condition(x, given, index, setup.seed, flow.space))


def labels_of_samples(flow: Conditioned, setup: Setup) -> Tensor | None:
    """Labels of a conditional flow's samples, drawn from the reference split by the evaluation seed.

    Those of conditions that images make are the images' own: a class at odds with its image would be no sample.

    Args:
        flow: whose samples.
        setup: the data, the number of samples and the evaluation seed.

    Returns:
        Shape (setup.num_samples,); None for an unconditional flow.
    """
    if flow.num_classes is None:
        return None
    own = flow.conditioner is not None
    label = setup.data.split(setup.held_out.name if own else setup.reference.name).label
    assert label is not None, "a conditional flow has labelled data"
    if own:
        return label[condition_rows(setup, torch.arange(setup.num_samples))]
    rng = torch.Generator().manual_seed(derive_seed(setup.seed, "labels"))
    return label[torch.randint(len(label), (setup.num_samples,), generator=rng)]
