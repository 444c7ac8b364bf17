"""Conditions beside the label: on the grid of the flow's space, made from the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from flowbench.core.checks import check_number
from flowbench.data import Batch, DataSpec
from flowbench.families.conditioning.condition import Condition, SpatialCondition
from flowbench.families.latents.space import Space

__all__ = [
    "Conditioner",
    "check_condition_channels",
    "check_given",
    "guided_network",
]


class Conditioner(ABC):
    """Makes the conditions that a flow is trained with and sampled under.

    Args:
        dropout: share of training conditions replaced by the null condition, zeros, in [0, 1). Above 0 a flow without
            labels can be guided by its condition. With labels, guidance is by the labels, under one condition.

    Raises:
        ValueError: for a share out of range.

    Example:
        >>> conditioners: list[Conditioner] = [InpaintingConditioner(), SemanticConditioner(categories=4)]
        >>> [conditioner.name for conditioner in conditioners]
        ['inpainting[square]', 'semantic[4 derived]']
        >>> [conditioner.channels(PixelSpace((1, 8, 8))) for conditioner in conditioners]
        [2, 4]
    """

    def __init__(self, dropout: float = 0.0) -> None:
        check_number("conditioner.dropout", dropout, at_least=0, below=1)
        self.dropout = dropout

    @property
    @abstractmethod
    def name(self) -> str:
        """What was trained: two flows with other names model other densities."""

    @property
    def takes_given(self) -> bool:
        """Whether conditions are the data's own, by :meth:`given_condition`, and not made from the values."""
        return False

    @property
    def sampler_name(self) -> str:
        """The name, and what is done to samples besides: a part of the sampler's name in every row."""
        return self.name

    @abstractmethod
    def channels(self, space: Space) -> int:
        """Channels K of the condition in a space.

        Raises:
            ValueError: for data that cannot be conditioned like this.
        """

    def check(self, spec: DataSpec) -> None:  # noqa: B027 - most take any data
        """Refuse data that no condition can be made of, before they are read.

        Args:
            spec: shape and classes of the data.

        Raises:
            ValueError: names what to change.
        """

    @abstractmethod
    def training_condition(self, batch: Batch, space: Space, generator: torch.Generator) -> SpatialCondition:
        """Conditions of a training batch, before any are dropped; every random number comes from `generator`."""

    @abstractmethod
    def evaluation_condition(self, x: Tensor, index: Tensor, seed: int, space: Space) -> SpatialCondition:
        """Conditions made from held-out data, the same for any batch and any number of processes.

        Args:
            x: data in model space, shape (B, *D).
            index: sample indices that key masks, shape (B,).
            seed: the evaluation seed.
            space: where the flow lives.
        """

    def given_condition(self, given: Tensor, space: Space) -> SpatialCondition:
        """Conditions of what the data hold beside the values; of conditioners with :attr:`takes_given`.

        Args:
            given: rows of the column that ``data.condition`` names, first dimension B.
            space: where the flow lives.
        """
        raise ValueError(f"{self.name} makes its conditions from the data: leave data.condition out")

    def held_out_condition(
        self, x: Tensor, given: Tensor | None, index: Tensor, seed: int, space: Space
    ) -> SpatialCondition:
        """Conditions of held-out data: their own where this conditioner takes those, else made from the values.

        Args:
            x: data in model space, shape (B, *D).
            given: of the same samples, the column that ``data.condition`` names; None where it names none.
            index: see :meth:`evaluation_condition`.
            seed: see :meth:`evaluation_condition`.
            space: where the flow lives.

        Raises:
            ValueError: when this conditioner takes the data's own and there are none.
        """
        if not self.takes_given:
            return self.evaluation_condition(x, index, seed, space)
        if given is None:
            raise ValueError(_none_given(self))
        return self.given_condition(given.to(x.device), space)

    def dropped(self, condition: SpatialCondition, generator: torch.Generator) -> SpatialCondition:
        """Replace a share of training conditions by the null condition; nothing is drawn where the share is 0."""
        if not self.dropout:
            return condition
        values = condition.values
        drop = torch.rand(len(values), generator=generator, device=values.device) < self.dropout
        return replace(condition, values=values.masked_fill(drop.view(-1, *[1] * (values.ndim - 1)), 0.0))

    def finish(self, x: Tensor, condition: SpatialCondition) -> Tensor:
        """What is done to samples (B, *D) after they were decoded; here nothing."""
        return x

    def scores(self, x: Tensor, condition: SpatialCondition) -> dict[str, tuple[Tensor, str]]:
        """How well unfinished samples keep to their condition.

        Args:
            x: samples in model space, shape (B, *D).
            condition: theirs, with `original` where there is one.

        Returns:
            Values (B,) and their unit by metric name; empty where there is no measure.
        """
        return {}

    def score_names(self, spec: DataSpec) -> tuple[str, ...] | None:
        """Names of what :meth:`scores` measures on such data; None where a class does not declare them."""
        return () if type(self).scores is Conditioner.scores else None


def check_condition_channels(network: nn.Module, conditioner: Conditioner | None, space: Space) -> None:
    """Refuse a network that was built for other conditions than the flow will give it.

    Raises:
        ValueError: names the number that fits.
    """
    found = getattr(network, "condition_channels", 0)
    wanted = 0 if conditioner is None else conditioner.channels(space)
    if found != wanted:
        what = "there is no conditioner" if conditioner is None else f"{conditioner.name} gives {wanted} in this space"
        raise ValueError(f"the network takes {found} condition channels, but {what}: set condition_channels={wanted}")


def check_given(conditioner: Conditioner | None, condition: str | None) -> None:
    """Refuse data whose conditions nothing takes, and a conditioner whose conditions no data give.

    Args:
        conditioner: the flow's, or None.
        condition: name of the data's column, or None.

    Raises:
        ValueError: one line with what to change.
    """
    if conditioner is not None and conditioner.takes_given and condition is None:
        raise ValueError(_none_given(conditioner))
    if condition is not None and (conditioner is None or not conditioner.takes_given):
        who = "the flow takes no conditions" if conditioner is None else f"{conditioner.name} makes its own conditions"
        raise ValueError(f"data.condition is {condition!r}, but {who}: remove it, or take a conditioner of given ones")


def _none_given(conditioner: Conditioner) -> str:
    return f"{conditioner.name} takes conditions that the data give: set data.condition to the column that holds them"


Guided = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided_network(
    network: Callable[..., Tensor], condition: Condition, conditioner: Conditioner | None
) -> tuple[Guided, Tensor | None]:
    """What a guidance rule calls, and what it is to take for the labels.

    With labels both branches keep the condition on the grid: the two are dropped independently in training, so hardly
    any sample had neither. Without labels the null branch has the null condition, where that was trained.

    Args:
        network: ``network(x, t, label, values)``.
        condition: of the samples.
        conditioner: that made the condition on the grid; None where there is none.

    Returns:
        ``guided(x, t, given)``, which evaluates the null branch where `given` is None; and what to hand to it: None
        where there is nothing to be guided by.
    """
    label, values = condition.label, condition.values
    if values is None or conditioner is None:
        return network, label
    by_condition = label is None and conditioner.dropout > 0
    nothing = torch.zeros_like(values) if by_condition else values

    def guided(x: Tensor, t: Tensor, given: Tensor | None) -> Tensor:
        velocity: Tensor = network(x, t, None, nothing) if given is None else network(x, t, label, values)
        return velocity

    return guided, values if by_condition else label
