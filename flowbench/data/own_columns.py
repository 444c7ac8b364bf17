"""The columns of a user's own data: whatever else a file holds of every sample."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from flowbench.data.columns import Column
from flowbench.data.spec import DataSpec

__all__ = ["checked_column", "column_keys", "column_of", "describe_column"]

# Words for labels: a file that holds them under such a name must not be taken for unlabelled.
_LABEL_WORDS = ("label", "y")


def column_keys(keys: Iterable[str], part: str, label_key: str, where: str) -> dict[str, str]:
    """The keys of the columns that belong to an array.

    Args:
        keys: of the file.
        part: name of the array: ``x``, ``train``, ``val`` or ``test``.
        label_key: of its labels.
        where: the file, for messages.

    Returns:
        The key by the name of the column, for every key ``<part>_<name>``.

    Raises:
        ValueError: one line, for a name that is nearly that of the labels, or no name.
    """
    found = {}
    for key in keys:
        name = key.removeprefix(f"{part}_")
        if name == key or key == label_key:
            continue
        if difflib.get_close_matches(name.lower(), _LABEL_WORDS, n=1, cutoff=0.8):
            raise ValueError(f"{where}: key {key!r} is not used; labels are {label_key!r}, columns have other names")
        if not name.isidentifier():
            raise ValueError(f"{where}: key {key!r}: the name of a column consists of letters, digits and _")
        found[name] = key
    return found


def checked_column(values: np.ndarray, num: int, where: str) -> Tensor:
    """A column as bool, uint8, signed integers or float32, first dimension N.

    Args:
        values: plain numbers of any shape and type.
        num: number of samples N.
        where: file and key, for messages.

    Raises:
        ValueError: one line, for another number of entries, complex numbers, or numbers beyond int64 or float32.
    """
    if not values.ndim or len(values) != num:
        raise ValueError(f"{where} must have {num} entries, one per sample, got shape {values.shape}")
    if 0 in values.shape[1:]:
        raise ValueError(f"{where} of shape {values.shape}: a dimension is empty")
    kind = values.dtype.kind
    if kind == "c":
        raise ValueError(f"{where} holds complex numbers; save real and imaginary parts as columns")
    if kind == "f":
        return _floats(values, where)
    if kind == "u" and values.dtype != np.uint8:
        if values.size and values.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{where} holds integers beyond int64; number them from 0")
        values = values.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(values))


def _floats(values: np.ndarray, where: str) -> Tensor:
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32)
    bad = int((~np.isfinite(single)).sum())
    if bad:
        raise ValueError(f"{where}: {bad} values are NaN, infinite or beyond float32; clean the data first")
    return torch.from_numpy(single)


def column_of(column: Tensor, spec: DataSpec) -> Column:
    """The declaration of a loaded column: spatial where its last two axes are those of the images."""
    shape = tuple(column.shape[1:])
    return Column(shape, spatial=bool(spec.grid) and shape[-2:] == spec.grid)


def describe_column(name: str, column: Tensor, declared: Column) -> str:
    """A column in a few words: ``column mask (uint8 8x8, on the images' grid)``."""
    sizes = "".join(f" {size}" for size in ("x".join(map(str, declared.shape)),) if size)
    place = ", on the images' grid" if declared.spatial else ""
    return f"column {name} ({str(column.dtype).removeprefix('torch.')}{sizes}{place})"
