"""Pairings: which source point meets which data point in a training step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowbench.data import Batch, FlowDataModule
from flowbench.flows import Coupling

if TYPE_CHECKING:
    from flowbench.families.flow_matching import FlowMatching

__all__ = ["BatchPairing", "Pairing", "Pairs", "cost_ratio"]


@dataclass
class Pairs:
    """The pairs of one training step.

    Attributes:
        x0: source points, shape (B, *flow_shape).
        x1: data points, shape (B, *flow_shape); ``x0[i]`` goes with ``x1[i]``.
        label: of ``x1`` as the network gets them, null labels included, int64 (B,); None for an unconditional flow.
        parts: scalars to log at every step, without a gradient.
        diagnostics: gives more of them; asked on the steps that are written down, because it costs something.
    """

    x0: Tensor
    x1: Tensor
    label: Tensor | None = None
    parts: dict[str, Tensor | float] = field(default_factory=dict)
    diagnostics: Callable[[], dict[str, Tensor | float]] | None = None


class Pairing(ABC):
    """A rule that gives every training point its source point.

    One pairing serves one flow. It is no module: nothing of it enters a checkpoint, so what it gives must be a function
    of the seed and of the batch's place in the training stream.
    """

    def setup(self, flow: FlowMatching, data: FlowDataModule | None) -> None:  # noqa: B027 - most rules need nothing
        """Get ready for training; called once on every process before the first step.

        Args:
            flow: the flow that is trained, with its seed set.
            data: where its batches come from; None when that is no :class:`FlowDataModule`.
        """

    def check(self, flow: FlowMatching, data: FlowDataModule) -> None:  # noqa: B027 - most rules take any
        """Refuse what :meth:`setup` will refuse, as far as it is known before data are read and models are trained.

        Args:
            flow: the flow that is to be trained; it may lie on the meta device.
            data: where its batches will come from.

        Raises:
            ValueError: one line with what to change.
        """

    @abstractmethod
    def pairs(self, flow: FlowMatching, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator) -> Pairs:
        """Pair the points of one batch.

        Args:
            flow: the flow that is trained or validated.
            x1: data points where the flow lives, shape (B, *flow_shape).
            label: labels as the network gets them, dropped ones null, shape (B,); None for an unconditional flow.
            batch: what `x1` was made from. Its own labels are those that no dropping changed; without a position it is
                no part of the training stream.
            rng: source of the step's random numbers.
        """

    def problem_size(self, batch_size: int) -> int:
        """Points that are paired at once where training batches, over all processes, have `batch_size`."""
        return batch_size

    def close(self) -> None:  # noqa: B027 - most rules hold nothing
        """Let go of threads and files; nothing happens at a second call."""


class BatchPairing(Pairing):
    """Fresh noise for every batch, coupled inside this process's share of it.

    Args:
        coupling: chooses a source point for every data point. Where the flow knows labels it is given those of the
            data, dropped ones too: which labels the network does without is no matter of the pairs.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling

    def pairs(self, flow: FlowMatching, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator) -> Pairs:
        """Noise from the step's generator, then the coupling's choice among it."""
        noise = flow.source.sample_for(x1, rng)
        start = time.perf_counter()
        x0 = noise[self.coupling(noise, x1, rng, true_label(label, batch))]
        seconds = time.perf_counter() - start

        def diagnostics() -> dict[str, Tensor | float]:
            own = {"coupling_ms": 1e3 * seconds, "effective_batch": float(len(x1))}
            return {**own, "cost_ratio": cost_ratio(x0, noise, x1)}

        return Pairs(x0, x1, label, diagnostics=diagnostics)

    def __repr__(self) -> str:
        return f"BatchPairing({self.coupling!r})"


def true_label(label: Tensor | None, batch: Batch) -> Tensor | None:
    """The data's own labels where the flow is conditional, before any was dropped."""
    return label if label is None or batch.label is None else batch.label


@torch.no_grad()
def cost_ratio(x0: Tensor, noise: Tensor, x1: Tensor) -> Tensor:
    """Mean squared distance of the pairs over that of the independent pairs (noise[i], x1[i]); all (B, *D), a scalar.

    1 for the independent coupling. Not a number where noise and data coincide point by point.
    """
    return (x0 - x1).square().sum() / (noise - x1).square().sum()
