"""The labels of a user's own data: integers 0..K-1, with the remedy for what people store instead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["checked_label", "number_of_classes"]


def checked_label(label: np.ndarray, num: int, where: str) -> Tensor:
    """Labels as int64 (N,).

    Args:
        label: of any shape and type.
        num: number of samples N.
        where: file and key, for messages.

    Raises:
        ValueError: one line, for labels that are no integers, or not one per sample.
    """
    if label.ndim == 2 and len(label) == num:
        raise ValueError(f"{where} must have shape ({num},), got {label.shape}; {_column_remedy(label)}")
    if label.dtype.kind not in "iu":
        raise ValueError(f"{where} must be integers, got {label.dtype}; save label.astype('int64')")
    if label.shape != (num,):
        raise ValueError(f"{where} must have shape ({num},), got {label.shape}; give one per sample")
    return torch.from_numpy(label.astype(np.int64))


def _column_remedy(label: np.ndarray) -> str:
    if label.shape[1] == 1:
        return "save label[:, 0]"
    if label.size and ((label == 0) | (label == 1)).all() and (label.sum(axis=1) == 1).all():
        return "these are one-hot, save label.argmax(1)"
    return "give one class per sample"


def number_of_classes(labels: Sequence[Tensor | None], declared: np.ndarray | None, where: str) -> int | None:
    """Number of classes K; labels must be 0..K-1 and, unless K is declared, use each of them.

    Args:
        labels: of every part.
        declared: the file's ``num_classes``.
        where: the file, for messages.

    Raises:
        ValueError: one line, for labels out of range or with gaps, or a number without labels.
    """
    number = _declared_number(declared, where)
    known = [label for label in labels if label is not None]
    if not known:
        if number is not None:
            raise ValueError(f"{where}: 'num_classes' is {number} but there are no labels; remove it or add 'label'")
        return None
    found = torch.cat(known).unique()
    low, high = int(found[0]), int(found[-1])
    if low < 0 or (number is not None and high >= number):
        top = high if number is None else number - 1
        raise ValueError(f"{where}: labels out of range: found {low} to {high}, expected 0 to {top}")
    if number is None and len(found) != high + 1:
        raise ValueError(
            f"{where}: labels out of range: {len(found)} different values from {low} to {high}, expected 0 to "
            f"{len(found) - 1}; renumber them or declare 'num_classes'"
        )
    return high + 1 if number is None else number


def _declared_number(value: np.ndarray | None, where: str) -> int | None:
    if value is None:
        return None
    if value.size != 1 or value.dtype.kind not in "iu" or int(value.reshape(())) < 1:
        raise ValueError(f"{where}: 'num_classes' must be one positive integer, got {value.tolist()}")
    return int(value.reshape(()))
