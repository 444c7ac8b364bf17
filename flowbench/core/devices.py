"""Waiting for a device's queue, and the cost of reading a value from it."""

from __future__ import annotations

import torch

__all__ = ["preparation_device", "reading_waits", "wait_for"]


def preparation_device(otherwise: torch.device) -> torch.device:
    """This process's GPU where there is one: what is made before the training does not wait for its module there.

    Args:
        otherwise: where there is none, commonly where the module lies by now.
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else otherwise


def reading_waits(device: torch.device) -> bool:
    """Whether a value of a tensor can be had only by waiting for all work that was queued before it.

    True of every device but the CPU. There a training step reads nothing, or the host could not run ahead of it.
    """
    return device.type != "cpu"


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what was queued, so that its time can be measured; a CPU queues nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
