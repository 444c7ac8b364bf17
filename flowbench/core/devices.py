"""What it costs to read a value from a device."""

from __future__ import annotations

import torch

__all__ = ["reading_waits"]


def reading_waits(device: torch.device) -> bool:
    """Whether a value of a tensor can be had only by waiting for all work that was queued before it.

    True of every device but the CPU. There a training step reads nothing, or the host could not run ahead of it.
    """
    return device.type != "cpu"
