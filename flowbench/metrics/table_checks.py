"""Checks of the arguments of every metric: finite tables, two of them of the same width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["as_table", "check_tables"]


def as_table(x: Tensor, name: str, minimum: int = 1) -> Tensor:
    """Flatten samples to a float64 table.

    Args:
        x: samples, shape (N, *D); a 1-D tensor is N scalars.
        name: of the argument, for the message.
        minimum: the fewest samples that the metric is defined for.

    Returns:
        Shape (N, prod(D)), float64, detached, on the device of ``x``.

    Raises:
        ValueError: no dimension, fewer than ``minimum`` samples, or a value that is not finite.
    """
    if x.ndim == 0:
        raise ValueError(f"{name} must have shape (N, *D), got a scalar; stack the samples first")
    if len(x) < minimum:
        raise ValueError(f"{name} has {len(x)} samples, this metric needs at least {minimum}; draw more")
    table = x.detach().reshape(len(x), math.prod(x.shape[1:])).to(torch.float64)
    bad = int((~torch.isfinite(table)).any(dim=1).sum())
    if bad:
        raise ValueError(f"{name} has {bad} of {len(x)} rows with NaN or infinity; check the model's samples")
    return table


def check_tables(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y"), minimum: int = 1) -> tuple[Tensor, Tensor]:
    """Two samples as float64 tables (N, D) and (M, D) on the device of ``x``.

    Raises:
        ValueError: as :func:`as_table`, or the widths differ.
    """
    first, second = as_table(x, names[0], minimum), as_table(y, names[1], minimum)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names[0]} has {first.shape[1]} dimensions and {names[1]} has {second.shape[1]}; "
            "take both from the same data or feature network"
        )
    return first, second.to(first.device)
