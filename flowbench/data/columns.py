"""Columns of a data set beside values and labels: masks, raters, first frames, known tails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowbench.core.checks import check_counts
from flowbench.core.lazy import lazy_module
from flowbench.core.nearest import nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flowbench.data.split import Split
else:
    torch = lazy_module("torch")

__all__ = ["Column", "check_column_name", "check_columns"]

_TYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float32")
# Rows at a time, so that looking for NaN never doubles a large column.
_CHUNK = 4096


@dataclass(frozen=True)
class Column:
    """A column as the catalogue declares it, known without loading.

    Attributes:
        shape: of one sample's entry, sizes up to 1e6; () for a number.
        spatial: its last two axes are the rows and columns of the images, so it is mirrored with them.

    Raises:
        ValueError: for a size out of range, or a spatial column without two axes.

    Example:
        >>> Column((1, 32, 32), spatial=True)  # a mask of an image of 32x32 pixels, mirrored with it
        Column(shape=(1, 32, 32), spatial=True)
    """

    shape: tuple[int, ...] = ()
    spatial: bool = False

    def __post_init__(self) -> None:
        check_counts("column.shape", self.shape, or_empty=True, at_most=10**6, hint="of one sample's entry")
        if self.spatial and len(self.shape) < 2:
            raise ValueError(f"column.spatial: a column of shape {self.shape} has no rows and columns; set it to False")


def check_column_name(option: str, name: str, columns: Mapping[str, Column], dataset: str) -> None:
    """Refuse the name of a column that a data set does not have.

    Args:
        option: what the user set to the name.
        name: the name.
        columns: those of the data set.
        dataset: its name.

    Raises:
        ValueError: one line with the columns that there are.
    """
    if name in columns:
        return
    near = nearest(name, columns)
    hint = f"did you mean {near!r}? " if near else ""
    found = ", ".join(sorted(columns)) or "none"
    raise ValueError(f"{option}: {dataset!r} has no column {name!r}; {hint}columns: {found}")


def check_columns(splits: Mapping[str, Split], declared: Mapping[str, Column], dataset: str) -> None:
    """Compare loaded columns with what the entry declares; reads floating ones whole.

    Args:
        splits: by name.
        declared: the entry's columns.
        dataset: its name, for messages.

    Raises:
        ValueError: one line, for a column that is missing or not declared, of another shape or type, or not finite.
    """
    for split, samples in splits.items():
        if odd := set(samples.columns) ^ set(declared):
            name = min(odd)
            fault = "is missing" if name in declared else "is not declared in the entry's columns"
            raise ValueError(f"{dataset}: column {name!r} of {split!r} {fault}; make them agree")
        for name, column in samples.columns.items():
            fault = _fault(column, declared[name])
            if fault:
                raise ValueError(f"{dataset}: column {name!r} of {split!r} {fault}")
    for name in declared:
        types = {split: _type_name(samples.columns[name]) for split, samples in splits.items()}
        if len(set(types.values())) > 1:
            found = ", ".join(f"{kind} in {split!r}" for split, kind in types.items())
            raise ValueError(f"{dataset}: column {name!r} is {found}; give all splits one type")


def _fault(column: Tensor, declared: Column) -> str:
    """The fault of a column with the remedy; empty without one."""
    if tuple(column.shape[1:]) != tuple(declared.shape):
        return f"has entries of shape {tuple(column.shape[1:])}, declared are {tuple(declared.shape)}; make them agree"
    if _type_name(column) not in _TYPES:
        return f"is of type {_type_name(column)}; save one of {', '.join(_TYPES)}"
    if column.is_floating_point():
        bad = sum(int((~torch.isfinite(part)).sum()) for part in column.split(_CHUNK))
        if bad:
            return f"holds {bad} values that are NaN or infinite; clean the data first"
    return ""


def _type_name(column: Tensor) -> str:
    return str(column.dtype).removeprefix("torch.")
