"""Labels that a network may be given."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_labels"]


def check_labels(label: Tensor, num_classes: int) -> None:
    """Refuse labels out of range, which would end the whole process on a GPU; reads the device once a call.

    Args:
        label: integers, shape (B,).
        num_classes: labels lie in 0..num_classes; the last is the null label.

    Raises:
        ValueError: names the range that was found.
    """
    if not label.numel():
        return
    low, high = torch.stack([label.min(), label.max()]).tolist()
    if not 0 <= low <= high <= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes} (the last is the null label), got {low}..{high}")
