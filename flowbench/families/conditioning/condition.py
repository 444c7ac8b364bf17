"""What a flow is given beside noise or data: labels, and conditions on the grid of its space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Condition", "SpatialCondition"]


@dataclass(frozen=True)
class SpatialCondition:
    """Conditions of some samples, and what they were made from.

    Attributes:
        values: the network's input on the grid of the flow's space, shape (B, K, *grid); zeros are the null condition.
        original: the data that the condition hides a part of, in model space, shape (B, *D); None where nothing of
            them belongs in the sample.
        unknown: which values of the data are hidden, bool, shape (B, H, W), or (B, d) for points; None without a mask.
        categories: a semantic map, int64, shape (B, H, W); None without one.

    Example:
        >>> condition = SpatialCondition(values=torch.zeros(3, 2, 8, 8))  # zeros: the null condition
        >>> len(condition), condition.unknown
        (3, None)
    """

    values: Tensor
    original: Tensor | None = None
    unknown: Tensor | None = None
    categories: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.values)


@dataclass(frozen=True)
class Condition:
    """Everything that some samples are conditioned on; with neither part, nothing.

    Attributes:
        label: class labels, integers, shape (B,); the number of classes is the null label. None: without labels.
        grid: what the flow's conditioner made, one per sample; None for a flow without a conditioner.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> spec = DataSpec("points", "1", (2,), num_classes=3)
        >>> flow = FlowMatching(spec, partial(MLP, width=16, depth=1), conditional=True)
        >>> condition = Condition(label=torch.tensor([0, 2]))
        >>> flow.sample(flow.draw_noise(torch.arange(2), seed=0), condition).x.shape
        torch.Size([2, 2])
        >>> flow.null_condition(2).label  # index 3 of the classes 0, 1, 2
        tensor([3, 3])
    """

    label: Tensor | None = None
    grid: SpatialCondition | None = None

    @classmethod
    def of(cls, given: Condition | Tensor | None) -> Condition:
        """A condition; labels alone are one, and so is None.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(given, Condition):
            return given
        if given is None or isinstance(given, Tensor):
            return cls(given)
        raise ValueError(
            f"a condition is a Condition, or labels as a tensor, got {type(given).__name__}: what a conditioner made "
            "is Condition(grid=...)"
        )

    @property
    def values(self) -> Tensor | None:
        """The network's input on the grid, shape (B, K, *grid); None without one."""
        return None if self.grid is None else self.grid.values

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What a network takes after the time: the labels, and the values on the grid where there are any."""
        return (self.label,) if self.grid is None else (self.label, self.grid.values)

    def rows(self, rows: slice | Tensor) -> Condition:
        """The condition of some samples."""
        grid = None if self.grid is None else SpatialCondition(self.grid.values[rows])
        return Condition(None if self.label is None else self.label[rows], grid)

    @classmethod
    def joined(cls, parts: Sequence[Condition]) -> Condition:
        """The conditions of several sets of samples, which have all the same parts, as one."""
        labels = [part.label for part in parts if part.label is not None]
        grids = [part.grid.values for part in parts if part.grid is not None]
        return cls(torch.cat(labels) if labels else None, SpatialCondition(torch.cat(grids)) if grids else None)
