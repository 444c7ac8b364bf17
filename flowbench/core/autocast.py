"""Autocast by device, for devices without it (``meta``) too."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["active_autocast_dtype", "autocast_off"]


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are computed in the precision of their inputs.

    Args:
        device: where the products run; nothing is to be turned off on one without autocast.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def active_autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes products in on a device at the moment; None where it is off or unknown."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
