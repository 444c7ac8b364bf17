"""The network of a flow map as a function of states and two times, for the points of a training batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from flowbench.families.conditioning.condition import Condition
from flowbench.networks import VelocityNetwork

__all__ = ["AverageVelocityNetwork", "Part"]


class Part(NamedTuple):
    """Points of a batch and the jumps whose average velocities are wanted.

    Attributes:
        x: states, shape (n, *D).
        start: their times, shape (n,).
        end: where the jumps end, shape (n,).
        rows: which points of the batch they are, for their conditions.
    """

    x: Tensor
    start: Tensor
    end: Tensor
    rows: slice


class AverageVelocityNetwork:
    """``u(x, s, t)`` under the conditions of a batch.

    All evaluations of one training step see the same dropout masks, as far as they are of equally many points: a target
    under other masks than the prediction would differ from it by noise of its own.

    Args:
        network: of two times.
        condition: of the points.
        training: whether dropout acts.
    """

    def __init__(self, network: nn.Module, condition: Condition, training: bool) -> None:
        self.network = network
        self.condition = condition
        self._masks = _RandomState.of(network) if training else None

    def __call__(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Velocities (B, *D) of states (B, *D) at the times `start` (B,) to the times `end` (B,)."""
        with self._same_masks():
            found: Tensor = self.network(x, start, self.condition.label, self.condition.values, end)
            return found

    def with_features(self, x: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, with the features that the velocities are made of, shape (B, *F)."""
        network = cast("VelocityNetwork", self.network)
        with self._same_masks():
            return network.with_features(x, start, self.condition.label, self.condition.values, end)

    def rows(self, rows: slice) -> AverageVelocityNetwork:
        """The same for some points of the batch."""
        return self.under(self.condition.rows(rows))

    def without_labels(self) -> AverageVelocityNetwork:
        """The same without labels."""
        return self.under(replace(self.condition, label=None))

    def together(self, parts: Sequence[Part]) -> list[Tensor]:
        """Average velocities of several parts by one evaluation; by one each where masks are to be shared."""
        if len(parts) < 2 or self._masks is not None:
            return [self.rows(part.rows)(*part[:3]) for part in parts]
        condition = Condition.joined([self.condition.rows(part.rows) for part in parts])
        inputs = (torch.cat(values) for values in zip(*(part[:3] for part in parts), strict=True))
        return list(self.under(condition)(*inputs).split([len(part.x) for part in parts]))

    def under(self, condition: Condition) -> AverageVelocityNetwork:
        """The same under another condition."""
        found = AverageVelocityNetwork(self.network, condition, training=False)
        found._masks = self._masks
        return found

    @contextmanager
    def _same_masks(self) -> Iterator[None]:
        if self._masks is not None:
            self._masks.restore()
        yield


class _RandomState:
    """The state of PyTorch's own generator, from which dropout draws."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    @classmethod
    def of(cls, network: nn.Module) -> _RandomState | None:
        """The state before a network's first evaluation; None where it has no dropout."""
        drops = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in network.modules())
        parameter = next(network.parameters(), None)
        return cls(parameter.device) if drops and parameter is not None else None

    def restore(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.state, self.device)
        else:
            torch.set_rng_state(self.state)
