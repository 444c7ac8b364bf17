"""The batch of one training or evaluation step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from flowbench.core.checks import LARGEST_SEED, check_count

__all__ = ["Batch", "check_group_size", "check_groups", "check_position"]


def check_position(position: int | None) -> None:
    """Refuse what is no place in the training stream: a whole number >= 0, or None."""
    check_count("position", position, at_least=0, at_most=LARGEST_SEED, or_none=True)


def check_group_size(group_size: int, num_samples: int) -> None:
    """Refuse a batch that is not made of whole groups of so many samples."""
    check_count("group_size", group_size, hint="1 is no groups")
    if num_samples % group_size:
        raise ValueError(f"group_size: {num_samples} samples are not made of groups of {group_size}")


def check_groups(batch_size: int, group_size: int, world_size: int = 1) -> None:
    """Refuse batches that are not made of whole groups on every process.

    Raises:
        ValueError: the batch is no multiple of the groups of all processes.
    """
    if batch_size % (group_size * world_size):
        raise ValueError(
            f"batch_size: {batch_size} (over all processes) must be a multiple of {group_size * world_size}, the "
            f"group_size {group_size} times the number of processes; change one of them"
        )


@dataclass
class Batch:
    """One batch in model space. A dataclass, so Lightning moves its tensors to the device.

    Lightning cannot infer a batch size from optional fields: pass ``batch_size=len(batch)`` to ``self.log``.

    Attributes:
        x: data in model space, float32, shape (B, *D); quantised images are dequantised into [-1, 1).
        label: class ids, int64, shape (B,), or None for unlabelled data.
        condition: any other conditioning, first dimension B, or None: the column that ``data.condition`` names.
        index: position of every sample in its split, int64, shape (B,).
        position: samples drawn by all processes before this (global) batch, >= 0; None in evaluation. Keys the
            dequantisation of training batches.
        columns: what else the data hold of these samples, by name, first dimension B; of images that were mirrored,
            so is what lies on their grid.
        group_size: so many consecutive samples share a class (``data.group_size``), >= 1; B is a multiple. A family of
            sequences views B as (B / group_size, group_size); every other one sees a batch of B. 1 in evaluation.

    Example:
        >>> batch = Batch(torch.zeros(4, 1, 8, 8), label=torch.tensor([3, 1, 4, 1]))
        >>> len(batch), batch.condition
        (4, None)
    """

    x: Tensor
    label: Tensor | None = None
    condition: Tensor | None = None
    index: Tensor | None = None
    position: int | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    group_size: int = 1

    def __post_init__(self) -> None:
        check_position(self.position)
        check_group_size(self.group_size, len(self.x))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from where a copy to a GPU does not make the host wait."""
        tensors: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        columns = {name: column.pin_memory() for name, column in self.columns.items()}
        return replace(self, **tensors, columns=columns)

    def __len__(self) -> int:
        """Number of samples of this process's part of the batch."""
        return self.x.shape[0]
