"""A user's own data: tensors in a file or images in a folder, checked at the door."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbench.core.folders import printable
from flowbench.data.array_files import ArrayFile
from flowbench.data.dataset_entry import DatasetEntry
from flowbench.data.declaration import Declaration
from flowbench.data.duplicates import first_duplicates, leaks
from flowbench.data.image_folder import read_image_folder
from flowbench.data.own_columns import checked_column, column_keys, column_of, describe_column
from flowbench.data.own_labels import checked_label, number_of_classes
from flowbench.data.own_values import Grid, checked_array, find_grid, find_units, to_model_values
from flowbench.data.spec import DataSpec, Units
from flowbench.data.split import SPLITS, Split, split_indices, stratified_order

__all__ = ["open_user_data"]

MIN_SAMPLES = 10
# Names the cut and the order of the splits; another rule is another version of the data.
RULE = "flowbench/user/1"
_WHOLE_KEYS = {"x", "label", "y", "num_classes"}
_SPLIT_KEYS = {*SPLITS, *(f"{name}_label" for name in SPLITS), "num_classes"}
_LABEL_REMEDY = "number the classes from 0: np.unique(label, return_inverse=True)[1]"

Arrays = dict[str, np.ndarray]


def open_user_data(
    kind: str, path: Path, image_size: int | None = None, declared: Declaration | None = None
) -> DatasetEntry:
    """Read and check a user's data.

    Arrays: ``x`` (or the file's only array) with optional ``label`` (or ``y``) and ``num_classes``; or
    ``train``, ``val`` and ``test`` with optional ``train_label``, ``val_label``, ``test_label``. Any other key that
    begins with the name of an array, ``x_mask`` or ``train_mask``, ``val_mask`` and ``test_mask``, is a column. Values
    are

    - uint8 images (N, C, H, W) or (N, H, W), on 256 levels;
    - with ``declared.levels`` other integers, images or vectors (N, d);
    - float images (N, C, H, W) in [-1, 1], or in ``declared.value_range``;
    - float vectors (N, d), with ``declared.standardize`` shifted and scaled.

    Floats have 16, 32 or 64 bits. What may be meant in two ways is refused with both declarations. Labels are integers
    0..K-1. Data without given splits are cut 80/10/10, stratified by class, in a fixed order.

    Copies of an image in training and test data would let a memoriser win. So, of data that are cut here, all copies
    of an image of levels go where the first goes, unless fewer than 10 different ones are left; given splits stay as
    they are. In each case a warning of one line counts the copies. Mirroring (``random_flip``) is allowed for all
    images, because only you know whether yours allow it.

    Args:
        kind: a key of ``USER_FORMATS``.
        path: the file or folder.
        image_size: see :func:`flowbench.data.image_folder.read_image_folder`.
        declared: what the user declares of the values; None is nothing.

    Returns:
        An entry whose version is the hash of the values and of all that makes them model values, holding the splits in
        memory, with one line of what was understood.

    Raises:
        ValueError: one line, when the data cannot be read or are not as above.
    """
    declared = declared or Declaration()
    remark = ""
    if kind == "image_folder":
        found = read_image_folder(path, image_size)
        arrays = {"x": found.values} if found.label is None else {"x": found.values, "label": found.label}
        remark = found.remark
    else:
        arrays = _read_arrays(kind, path)
    return _entry(kind, path, arrays, declared, remark)


def _read_arrays(kind: str, path: Path) -> Arrays:
    """The named arrays of a file; a single array is called ``x``."""
    file = ArrayFile.open(kind, path)
    keys = {name: name for name in file.names}
    if len(keys) == 1 and not set(keys) <= _WHOLE_KEYS | _SPLIT_KEYS:
        keys = {"x": file.names[0]}
    _check_keys(list(keys), printable(path))
    return {
        key: file.array(name, _LABEL_REMEDY) if key in ("y", "label") or key.endswith("_label") else file.array(name)
        for key, name in keys.items()
    }


def _check_keys(names: list[str], where: str) -> None:
    keys = set(names)
    given = bool(keys & set(SPLITS))
    known, needed = (_SPLIT_KEYS, set(SPLITS)) if given else (_WHOLE_KEYS, {"x"})
    if missing := needed - keys:
        raise ValueError(f"{where}: key {sorted(missing)[0]!r} is missing; found: {', '.join(sorted(keys)) or 'none'}")
    columns = [column_keys(names, part, f"{part}_label" if given else "label", where) for part in sorted(needed)]
    if unknown := keys - known - {key for found in columns for key in found.values()}:
        raise ValueError(f"{where}: key {sorted(unknown)[0]!r} is not used; known: {', '.join(sorted(known))}")
    if {"label", "y"} <= keys:
        raise ValueError(f"{where}: holds both 'label' and 'y'; keep one")


def _entry(kind: str, path: Path, arrays: Arrays, declared: Declaration, remark: str) -> DatasetEntry:
    where, given = printable(path), "train" in arrays
    parts = {key: _checked_part(arrays, key, declared, where) for key in (SPLITS if given else ("x",))}
    if given:
        _check_agreement(parts, where)
    grid = find_grid({key: part.values for key, part in parts.items()}, declared, where)
    classes = number_of_classes([part.label for part in parts.values()], arrays.get("num_classes"), where)
    raw = _mixed(parts) if given else _cut(parts["x"], grid, where)
    units = None
    if grid is None:
        units = find_units({name: part.values for name, part in raw.items()}, declared, where)
    splits = {name: part.split(grid, units, where) for name, part in raw.items()}
    if given:
        _warn_of_leaks(splits, where)
    levels = None if grid is None else grid.levels
    shape = tuple(splits["train"].values.shape[1:])
    spec = DataSpec(
        f"{kind}:{printable(path.stem)}", _version(splits, levels, units, classes), shape, classes, levels, units
    )
    return DatasetEntry(
        spec,
        f"your data at {where}",
        "yours",
        "yours",
        load=lambda root: splits,
        num_samples={split: len(splits[split]) for split in SPLITS},
        flips=bool(spec.grid),
        understood=f"{kind} {where}: {_understood(parts, raw, spec, given)}{f'; {remark}' if remark else ''}",
        columns={name: column_of(column, spec) for name, column in splits["train"].columns.items()},
    )


@dataclass(frozen=True)
class _Part:
    """Values as the file holds them, (N, d) or (N, C, H, W), labels int64 (N,) or None, and columns."""

    values: np.ndarray
    label: Tensor | None
    columns: dict[str, Tensor]

    def take(self, indices: Tensor) -> _Part:
        """The samples at ``indices``, in that order."""
        label = None if self.label is None else self.label[indices]
        columns = {name: column.index_select(0, indices) for name, column in self.columns.items()}
        return _Part(self.values.take(indices.numpy(), axis=0), label, columns)

    def split(self, grid: Grid | None, units: Units | None, where: str) -> Split:
        """The same samples in model space, or on their grid."""
        return Split(to_model_values(self.values, grid, units, where), self.label, self.columns)


def _checked_part(arrays: Arrays, key: str, declared: Declaration, where: str) -> _Part:
    values = checked_array(arrays[key], declared, f"{where}: {key!r}")
    least = MIN_SAMPLES if key in ("x", "train") else 1
    if len(values) < least:
        raise ValueError(f"{where}: {key!r} holds {len(values)} samples; at least {least} are needed")
    label_key = f"{key}_label" if key != "x" else "label" if "label" in arrays else "y"
    stored = arrays.get(label_key)
    label = None if stored is None else checked_label(stored, len(values), f"{where}: labels of {key!r}")
    found = column_keys(arrays, key, label_key, where)
    columns = {name: checked_column(arrays[k], len(values), f"{where}: {k!r}") for name, k in found.items()}
    return _Part(values, label, columns)


def _check_agreement(parts: Mapping[str, _Part], where: str) -> None:
    first = parts["train"]
    for name, part in parts.items():
        if part.values.shape[1:] != first.values.shape[1:] or part.values.dtype != first.values.dtype:
            raise ValueError(f"{where}: {name!r} holds {_kind(part)}, 'train' holds {_kind(first)}; make them agree")
        if (part.label is None) != (first.label is None):
            raise ValueError(f"{where}: give '{name}_label' and 'train_label' both or neither")
        for column in sorted(set(part.columns) ^ set(first.columns)):
            raise ValueError(f"{where}: give '{name}_{column}' and 'train_{column}' both or neither")


def _kind(part: _Part) -> str:
    """The kind of a sample, for messages."""
    return f"{part.values.dtype} samples of shape {part.values.shape[1:]}"


# ---- splits ---------------------------------------------------------------------------------------------


def _cut(whole: _Part, grid: Grid | None, where: str) -> dict[str, _Part]:
    """Train, val and test of data that came in one piece; copies of an image stay together."""
    first = torch.arange(len(whole.values))
    if grid is not None and whole.values.ndim == 4:  # points on a grid may agree by chance
        first = first_duplicates(to_model_values(whole.values, grid, None, where))
    originals = first.unique()
    if len(originals) < MIN_SAMPLES:
        _warn(
            f"{where}: holds only {len(originals)} different images; every split repeats them, so scores mean nothing"
        )
        first = originals = torch.arange(len(whole.values))
    elif copies := len(whole.values) - len(originals):
        _warn(f"{where}: {copies} images are copies of others; copies were put into the split of the first")
    label = None if whole.label is None else whole.label[originals]
    order = split_indices(len(originals), RULE, len(originals) // 10, len(originals) // 10, label)
    parts = {}
    for name in SPLITS:
        members = torch.isin(first, originals[order[name]]).nonzero()[:, 0]
        labels = None if whole.label is None else whole.label[members]
        parts[name] = whole.take(members[_mixed_order(labels, len(members), name)])
    return parts


def _mixed(parts: Mapping[str, _Part]) -> dict[str, _Part]:
    return {name: part.take(_mixed_order(part.label, len(part.values), name)) for name, part in parts.items()}


def _mixed_order(label: Tensor | None, num: int, name: str) -> Tensor:
    """An order whose every prefix holds all classes: folders come sorted, and evaluation takes prefixes."""
    return stratified_order(num, f"{RULE}/{name}", label)


def _warn_of_leaks(splits: dict[str, Split], where: str) -> None:
    found = leaks({name: split.values for name, split in splits.items() if split.values.ndim == 4})
    if found:
        shared = ", ".join(f"{count} of {later} in {earlier}" for (earlier, later), count in found.items())
        _warn(f"{where}: images lie in two splits ({shared}); scores will flatter a memoriser")


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)


# ---- identity and summary -------------------------------------------------------------------------------


def _version(splits: Mapping[str, Split], levels: int | None, units: Units | None, classes: int | None) -> str:
    """The hash of the values in their order, with all that gives the bytes a meaning."""
    meaning: dict[str, Any] = {
        "rule": RULE,
        "levels": levels,
        "units": None if units is None else [units.shift, units.scale],
        "classes": classes,
        "splits": {
            name: [list(split.values.shape), str(split.values.dtype), split.label is not None]
            for name, split in splits.items()
        },
    }
    columns = {
        name: {c: [list(column.shape), str(column.dtype)] for c, column in split.columns.items()}
        for name, split in splits.items()
        if split.columns
    }
    if columns:  # data without any keep the version that they had before there were columns
        meaning["columns"] = columns
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for split in splits.values():
        digest.update(split.values.numpy().data)
        if split.label is not None:
            digest.update(split.label.numpy().data)
        for name in sorted(split.columns):
            digest.update(split.columns[name].contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()[:16]}"


def _understood(parts: Mapping[str, _Part], raw: Mapping[str, _Part], spec: DataSpec, given: bool) -> str:
    """How the data were read, in one line: numbers, shape, values, classes."""
    numbers = " + ".join(f"{len(raw[name].values):,}" for name in SPLITS)
    by_class = "" if spec.num_classes is None else " by class"
    origin = "as given" if given else f"cut 80/10/10{by_class}"
    low = min(float(part.values.min()) for part in parts.values())
    high = max(float(part.values.max()) for part in parts.values())
    values = f"{raw['train'].values.dtype} from {low:.4g} to {high:.4g}"
    facts = [
        f"{numbers} (train + val + test, {origin})",
        spec.summary,
        f"{values}{_meaning(spec)}",
        _classes(raw, spec),
    ]
    columns = sorted(raw["train"].columns.items())
    return ", ".join([*facts, *(describe_column(name, column, column_of(column, spec)) for name, column in columns)])


def _meaning(spec: DataSpec) -> str:
    if spec.levels is not None:
        return f" on {spec.levels} levels"
    if spec.units is None:
        return " taken as they are"
    if not spec.grid:
        return " standardized"
    low, high = (spec.units.to_data(torch.tensor(end)).item() for end in (-1.0, 1.0))
    return f" where [{low:g}, {high:g}] becomes [-1, 1]"


def _classes(raw: Mapping[str, _Part], spec: DataSpec) -> str:
    if spec.num_classes is None:
        return "unlabelled"
    label = torch.cat([part.label for part in raw.values() if part.label is not None])
    counts = label.bincount(minlength=spec.num_classes)
    return f"{spec.num_classes} classes of {int(counts.min()):,} to {int(counts.max()):,}"
