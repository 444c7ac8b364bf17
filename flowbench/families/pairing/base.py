"""What a pairing rule is: it gives every training point its source point."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor

from flowbench.data import Batch, FlowDataModule
from flowbench.families.latents.space import Space
from flowbench.flows import Coupling, Source
from flowbench.training.preparation import Preparation

__all__ = ["ClosePairing", "Pairing", "PairingContext", "Pairs", "cost_ratio", "true_label"]


@dataclass(frozen=True)
class PairingContext:
    """The facts of a flow that its pairs depend on.

    Attributes:
        source: where the flow starts.
        space: where it lives.
        num_classes: of a conditional flow, else None.
        label_dropout: share of the training labels that are replaced by the null label, in [0, 1).
        seed: training seed.
        device: of the flow's weights.
        rank: this process's number, 0 where there is one process.
        world_size: number of processes.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> flow = FlowMatching(DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1))
        >>> context = flow.pairing_context
        >>> context.source, context.space.shape, context.num_classes, context.world_size
        (GaussianSource(std=1), (2,), None, 1)
    """

    source: Source
    space: Space
    num_classes: int | None
    label_dropout: float
    seed: int
    device: torch.device
    rank: int = 0
    world_size: int = 1


@dataclass
class Pairs:
    """The pairs of one training step.

    Attributes:
        x0: source points, shape (B, *flow_shape).
        x1: data points, shape (B, *flow_shape); ``x0[i]`` goes with ``x1[i]``.
        label: of ``x1`` as the network gets them, null labels included, int64 (B,); None for an unconditional flow.
        metrics: scalars to log at every step, without a gradient.
        diagnostics: computes more of them; called only on logging steps, because it is expensive.

    Example:
        >>> pairs = Pairs(x0=torch.zeros(3, 2), x1=torch.ones(3, 2))
        >>> (pairs.x1 - pairs.x0).norm(dim=1), pairs.label
        (tensor([1.4142, 1.4142, 1.4142]), None)
    """

    x0: Tensor
    x1: Tensor
    label: Tensor | None = None
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    diagnostics: Callable[[], dict[str, Tensor | float]] | None = None


class Pairing(ABC):
    """A rule that gives every training point its source point.

    One pairing serves one flow. It is no module: nothing of it enters a checkpoint, so what it gives must be a function
    of the seed and of the batch's place in the training stream.

    Attributes:
        coupling: what chooses among source points, where the rule uses a coupling.
        is_independent: source and data points are paired as drawn.
        looks_up_data: data points follow the noise, in place of the loader's.
        described: names of what :meth:`describe` returns.

    Example:
        >>> from flowbench.data import Batch
        >>> from flowbench.flows import GaussianSource
        >>> class FromTheOrigin(Pairing):
        ...     def pairs(self, context, x1, label, batch, rng):
        ...         return Pairs(torch.zeros_like(x1), x1, label)
        >>> context = PairingContext(GaussianSource(), PixelSpace((2,)), None, 0.0, seed=0, device=torch.device("cpu"))
        >>> FromTheOrigin().pairs(context, torch.ones(3, 2), None, Batch(torch.ones(3, 2)), torch.Generator()).x0.shape
        torch.Size([3, 2])
    """

    coupling: Coupling | None = None
    is_independent = False
    looks_up_data = False
    described: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares what it holds, teachers, stored pairs and potentials: nothing changes them."""
        made = copy.copy(self)
        memo[id(self)] = made
        return made

    def prepare(self, context: PairingContext, data: FlowDataModule) -> Preparation:
        """Make what the pairs need of the training data, or read it from the cache; most rules need nothing.

        Called before the first step on every process, before :meth:`setup`, and where pairs are described. A second
        call does nothing.

        Args:
            context: of the flow.
            data: where its batches come from.

        Returns:
            What it cost, be it now or before: a part of the training budget.
        """
        return Preparation()

    def setup(self, context: PairingContext, data: FlowDataModule | None, training: bool = True) -> None:  # noqa: B027
        """Get ready; called once on every process before the first step. Most rules need nothing.

        Args:
            context: of the flow, with its seed set.
            data: where its batches come from; None when that is no :class:`FlowDataModule`.
            training: False where only validation batches follow.
        """

    def check(self, context: PairingContext, data: FlowDataModule) -> None:  # noqa: B027 - most rules take any
        """Refuse what :meth:`setup` will refuse, as far as it is known before data are read and models are trained.

        Args:
            context: of the flow that is to be trained; it may lie on the meta device.
            data: where its batches will come from.

        Raises:
            ValueError: one line with what to change.
        """

    @abstractmethod
    def pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """Pair the points of one batch.

        Args:
            context: of the flow that is trained or validated.
            x1: data points where the flow lives, shape (B, *flow_shape).
            label: labels as the network gets them, dropped ones null, shape (B,); None for an unconditional flow.
            batch: what `x1` was made from. Its own labels are those that no dropping changed; without a position it is
                no part of the training stream.
            rng: source of the step's random numbers.
        """

    def typical_pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """Pairs as those of training are distributed, outside of its stream: what descriptions look at.

        Args:
            context: of the flow.
            x1: points of the training split, shape (B, *flow_shape).
            label: their labels, shape (B,); None for an unconditional flow.
            batch: what `x1` was made from.
            rng: source of every random number.
        """
        return self.pairs(context, x1, label, batch, rng)

    def describe(self) -> dict[str, float]:
        """What else there is to report of the rule, by the names of :attr:`described`."""
        return {}

    def num_coupled(self, batch_size: int) -> int:
        """Points that are paired at once where training batches, over all processes, have `batch_size`."""
        return batch_size

    def close(self) -> None:  # noqa: B027 - most rules hold nothing
        """Shut down worker threads and close files; a second call does nothing."""


class ClosePairing(L.Callback):
    """Shuts down a pairing when training breaks off, which Lightning reports to callbacks only."""

    def __init__(self, pairing: Pairing) -> None:
        self._pairing = pairing

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Shut it down."""
        self._pairing.close()


def true_label(label: Tensor | None, batch: Batch) -> Tensor | None:
    """The data's own labels where the flow is conditional, before any was dropped."""
    return label if label is None or batch.label is None else batch.label


@torch.no_grad()
def cost_ratio(x0: Tensor, noise: Tensor, x1: Tensor) -> Tensor:
    """Mean squared distance of the pairs over that of the independent pairs (noise[i], x1[i]); all (B, *D), a scalar.

    1 for the independent coupling. Not a number where noise and data coincide point by point.
    """
    return (x0 - x1).square().sum() / (noise - x1).square().sum()
