"""From a user's arrays to model space: what kind of values they are, and one question for each doubtful range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowbench.data.declaration import Declaration
from flowbench.data.spec import Units

__all__ = ["Grid", "checked_array", "find_grid", "find_units", "to_model_values"]

# Pictures whose brightest value is below this are more likely on a coarser grid than that dark.
_DIMMEST = 64
# Vectors need a declaration where a dimension's spread or mean is further from those of the noise than this.
_STD_RANGE, _MOST_MEAN = (0.1, 10.0), 10.0
# Rows at a time, so that float64 never doubles a large array.
_CHUNK = 1024


@dataclass(frozen=True)
class Grid:
    """Integers as levels.

    Attributes:
        levels: how many.
        low: smallest value found.
        high: largest value found.
    """

    levels: int
    low: int
    high: int


# ---- one array ------------------------------------------------------------------------------------------


def checked_array(values: np.ndarray, declared: Declaration, where: str) -> np.ndarray:
    """Values as integers or floats of shape (N, d) or (N, C, H, W).

    Args:
        values: of any shape and type; grey integers (N, H, W) get a channel.
        declared: what the user declares of them.
        where: file and key, for messages.

    Raises:
        ValueError: one line, for another type or shape, NaN, or an empty dimension.
    """
    where = f"{where} of shape {values.shape} and type {values.dtype}"
    if values.dtype.kind == "c":
        raise ValueError(f"{where}: complex values have no density here; save real and imaginary parts as columns")
    check = _check_floats if values.dtype.kind == "f" else _check_integers
    values = check(values, declared, where)
    if 0 in values.shape[1:]:
        raise ValueError(f"{where}: a dimension is empty")
    if values.ndim == 4 and values.shape[1] > 4 >= values.shape[3]:
        raise ValueError(f"{where}: channels seem to come last; transpose to (N, C, H, W)")
    return values


def _check_integers(values: np.ndarray, declared: Declaration, where: str) -> np.ndarray:
    if values.ndim == 2 and declared.levels is None and values.dtype == np.uint8:
        raise ValueError(
            f"{where}: uint8 means images (N, C, H, W) or (N, H, W); save vectors as float32, or declare "
            "data.levels for vectors on a grid"
        )
    if values.ndim not in (2, 3, 4):
        raise ValueError(f"{where}: integers must be images (N, C, H, W) or (N, H, W), or vectors (N, d)")
    return values[:, None] if values.ndim == 3 else values


def _check_floats(values: np.ndarray, declared: Declaration, where: str) -> np.ndarray:
    if declared.levels is not None:
        raise ValueError(f"{where}: data.levels={declared.levels} means integers; save them as uint8, or remove it")
    if values.ndim not in (2, 4):
        hint = {1: "; a single column is x[:, None]", 3: "; grey images are x[:, None]"}.get(values.ndim, "")
        raise ValueError(f"{where}: floats must be vectors (N, d) or images (N, C, H, W){hint}")
    if not all(np.isfinite(part).all() for part in _chunks(values)):
        bad = sum(int((~np.isfinite(part)).sum()) for part in _chunks(values))
        raise ValueError(f"{where}: {bad} values are NaN or infinite; clean the data first")
    return values


def _chunks(values: np.ndarray) -> list[np.ndarray]:
    return [values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK)]


# ---- all splits together --------------------------------------------------------------------------------


def find_grid(splits: Mapping[str, np.ndarray], declared: Declaration, where: str) -> Grid | None:
    """The grid of integers; None for floats.

    Args:
        splits: checked arrays of one type.
        declared: what the user declares of them.
        where: the file, for messages.

    Raises:
        ValueError: one line, for integers that do not fit the grid, or whose grid is not clear.
    """
    arrays = [values for values in splits.values() if values.size]
    if arrays[0].dtype.kind == "f":
        return None
    for option in ("value_range", "standardize"):
        if getattr(declared, option) not in (None, False):
            raise ValueError(f"{where}: data.{option} is for floats, found {arrays[0].dtype}; remove it")
    low, high = min(int(a.min()) for a in arrays), max(int(a.max()) for a in arrays)
    found = f"{where}: {arrays[0].dtype} values from {low} to {high}"
    levels = declared.levels
    if levels is None:
        levels = _undeclared_levels(arrays[0], low, high, found)
    if low < 0 or high >= levels:
        raise ValueError(f"{found} do not fit data.levels={levels}, which means 0 to {levels - 1}; change one of them")
    return Grid(levels, low, high)


def _undeclared_levels(values: np.ndarray, low: int, high: int, found: str) -> int:
    if low < 0 or high > 255:
        raise ValueError(f"{found} are no levels 0 to 255; save float32 where they are quantities, or shift and scale")
    count = max(2, high + 1)
    if values.dtype != np.uint8:
        raise ValueError(
            f"{found}: declare data.levels={count} (or more, to 256) where they are levels; save float32 otherwise"
        )
    if high < _DIMMEST:
        raise ValueError(
            f"{found} are very dark, or on a coarser grid: declare data.levels={count} for {count} levels, or "
            "data.levels=256"
        )
    return 256


def find_units(splits: Mapping[str, np.ndarray], declared: Declaration, where: str) -> Units | None:
    """The map of float values to model space; None takes them as they are.

    Args:
        splits: checked float arrays; vectors are measured on ``train``, the range of images on all.
        declared: what the user declares of them.
        where: the file, for messages.

    Raises:
        ValueError: one line: values outside of what was declared, a range that is not clear, or a constant dimension.
    """
    if splits["train"].ndim == 2:
        return _vector_units(splits["train"], declared, where)
    return _image_units(splits, declared, where)


def _image_units(splits: Mapping[str, np.ndarray], declared: Declaration, where: str) -> Units | None:
    if declared.standardize is not None:
        raise ValueError(f"{where}: data.standardize is for vectors; images declare data.value_range=[low,high]")
    arrays = [values for values in splits.values() if values.size]
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    found = f"{where}: float images from {low:g} to {high:g}"
    if declared.value_range is not None:
        least, most = declared.value_range
        if low < least or high > most:
            raise ValueError(f"{found} do not fit data.value_range=[{least:g},{most:g}]; change one of them")
        centre, half = (least + most) / 2, (most - least) / 2
        return None if (centre, half) == (0.0, 1.0) else Units((centre,), (half,))
    if low < -1 or high > 1:
        bounds = "[0,255]" if low >= 0 and 1 < high <= 255 else "[low,high]"
        raise ValueError(
            f"{found} do not lie in [-1, 1]: declare data.value_range={bounds}, which becomes [-1, 1], or save uint8"
        )
    if low >= 0 or high - low <= 1:
        other = "[0,1]" if low >= 0 else "[-0.5,0.5]"
        raise ValueError(
            f"{found} may be meant as in [-1, 1] or not: declare data.value_range=[-1,1] or data.value_range={other}"
        )
    return None


def _vector_units(train: np.ndarray, declared: Declaration, where: str) -> Units | None:
    if declared.value_range is not None:
        raise ValueError(f"{where}: data.value_range is for images; vectors declare data.standardize=true or false")
    if declared.standardize is False:
        return None
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    if (constant := np.flatnonzero(std == 0)).size:
        named = ", ".join(map(str, constant[:5])) + (", ..." if constant.size > 5 else "")
        raise ValueError(
            f"{where}: dimension {named} is constant in the training split, where no density exists: remove it, or "
            "declare data.standardize=false to take the values as they are"
        )
    if declared.standardize:
        return Units(tuple(mean.tolist()), tuple(std.tolist()))
    if std.min() < _STD_RANGE[0] or std.max() > _STD_RANGE[1] or np.abs(mean).max() > _MOST_MEAN:
        raise ValueError(
            f"{where}: dimensions have means from {mean.min():.3g} to {mean.max():.3g} and standard deviations from "
            f"{std.min():.3g} to {std.max():.3g}, far from the noise's 0 and 1: declare data.standardize=true, or "
            "false to take them as they are"
        )
    return None


def to_model_values(values: np.ndarray, grid: Grid | None, units: Units | None, where: str) -> Tensor:
    """Levels as uint8, floats as float32 in model space.

    Raises:
        ValueError: one line, for values beyond float32.
    """
    if grid is not None:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.uint8))
    out = np.empty(values.shape, dtype=np.float32)
    with np.errstate(over="ignore"):
        for source, target in zip(_chunks(values), _chunks(out), strict=True):
            target[...] = source if units is None else units.from_data(torch.from_numpy(source).double()).numpy()
    if not np.isfinite(out).all():
        raise ValueError(f"{where}: values beyond the range of float32 (3e38); rescale them")
    return torch.from_numpy(out)
