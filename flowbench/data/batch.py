"""What a loader hands to a family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass
class Batch:
    """One batch in model space. A dataclass, so Lightning moves its tensors to the device.

    Lightning cannot infer a batch size from optional fields: pass ``batch_size=len(batch)`` to ``self.log``.

    Attributes:
        x: data in model space, float32, shape (B, *D); quantised images are dequantised into [-1, 1).
        label: class ids, int64, shape (B,), or None for unlabelled data.
        condition: any other conditioning, first dimension B, or None.
        index: position of every sample in its split, int64, shape (B,).
        position: samples drawn by all processes before this (global) batch; None in evaluation. Keys the
            dequantisation of training batches.
    """

    x: Tensor
    label: Tensor | None = None
    condition: Tensor | None = None
    index: Tensor | None = None
    position: int | None = None

    def __len__(self) -> int:
        """Number of samples of this process's part of the batch."""
        return self.x.shape[0]
