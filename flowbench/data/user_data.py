"""A user's own data: tensors in a file or images in a folder, checked at the door."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbench.data.copies import first_copies, leaks
from flowbench.data.entry import DatasetEntry
from flowbench.data.image_folder import read_image_folder
from flowbench.data.spec import DataSpec
from flowbench.data.split import SPLITS, Split, cut_order, stratified_order

__all__ = ["open_user_data"]

MIN_SAMPLES = 10
_WHOLE_KEYS = {"x", "label", "y", "num_classes"}
_SPLIT_KEYS = {*SPLITS, *(f"{name}_label" for name in SPLITS), "num_classes"}


def open_user_data(kind: str, path: Path, image_size: int | None = None) -> DatasetEntry:
    """Read and check a user's data.

    Arrays: ``x`` (or the file's only array) with optional ``label`` (or ``y``) and ``num_classes``; or
    ``train``, ``val`` and ``test`` with optional ``train_label``, ``val_label``, ``test_label``. Values are
    uint8 images (N, C, H, W) or (N, H, W), float32/64 images (N, C, H, W) in [-1, 1], or float32/64 vectors
    (N, d). Labels are integers 0..K-1. Data without given splits are cut 80/10/10, stratified by class, in a
    fixed order.

    Copies of an image in training and test data would let a memoriser win. So, of data that are cut here, all copies
    of a uint8 image go where the first goes, unless fewer than 10 different ones are left; given splits stay as they
    are. In each case a warning of one line counts the copies. Mirroring (``random_flip``) is allowed for all images,
    because only you know whether yours allow it.

    Args:
        kind: a key of ``USER_FORMATS``.
        path: the file or folder.
        image_size: see :func:`flowbench.data.image_folder.read_image_folder`.

    Returns:
        An entry whose version contains the hash of the values, holding the splits in memory.

    Raises:
        ValueError: one line, when the data cannot be read or are not as above.
    """
    if kind == "image_folder":
        images, label = read_image_folder(path, image_size)
        arrays: dict[str, Tensor] = {"x": images} if label is None else {"x": images, "label": label}
    else:
        arrays = _read_arrays(kind, path)
    splits, num_classes = _splits(arrays, path)
    train = splits["train"].values
    levels = 256 if train.dtype == torch.uint8 else None
    name, version = f"{kind}:{path.stem}", _content_hash(splits.values())
    spec = DataSpec(name, version, tuple(train.shape[1:]), num_classes, levels)
    return DatasetEntry(
        spec,
        f"your data at {path}",
        "yours",
        "yours",
        load=lambda root: splits,
        num_samples={split: len(splits[split]) for split in SPLITS},
        flips=spec.modality == "image",
    )


def _content_hash(splits: Iterable[Split]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.values.numpy().tobytes())
        digest.update(b"" if split.label is None else split.label.numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _read_arrays(kind: str, path: Path) -> dict[str, Tensor]:
    """The named arrays of a file; a single array is called ``x``."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a .{kind} file, got a folder")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True) if kind == "pt" else _read_numpy(path)
    except Exception as error:  # Broken files make NumPy, zipfile and pickle raise nearly anything.
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise ValueError(f"{path}: cannot be read as {kind} ({type(error).__name__}: {reason})") from error
    if not isinstance(loaded, Mapping):
        loaded = {"x": loaded}
    arrays = {str(key): _tensor(value, str(key), path) for key, value in loaded.items()}
    if len(arrays) == 1 and not set(arrays) <= _WHOLE_KEYS | _SPLIT_KEYS:
        arrays = {"x": next(iter(arrays.values()))}
    return arrays


def _read_numpy(path: Path) -> Any:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        return {key: loaded[key] for key in loaded.files}


def _tensor(value: Any, key: str, path: Path) -> Tensor:
    """A tensor of whatever one key holds."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
        return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape))
    except TypeError as error:
        raise ValueError(f"{path}: {key!r} is a {type(value).__name__} that holds no numbers; save arrays") from error


def _splits(arrays: dict[str, Tensor], path: Path) -> tuple[dict[str, Split], int | None]:
    """Splits and number of classes from named arrays."""
    given = bool(set(arrays) & set(SPLITS))
    known, needed = (_SPLIT_KEYS, set(SPLITS)) if given else (_WHOLE_KEYS, {"x"})
    if missing := needed - set(arrays):
        raise ValueError(f"{path}: key {sorted(missing)[0]!r} is missing; found: {', '.join(sorted(arrays)) or 'none'}")
    if unknown := set(arrays) - known:
        raise ValueError(f"{path}: key {sorted(unknown)[0]!r} is not used; known: {', '.join(sorted(known))}")
    if {"label", "y"} <= set(arrays):
        raise ValueError(f"{path}: holds both 'label' and 'y'; keep one")
    num_classes = _declared_classes(arrays.get("num_classes"), path)
    if given:
        splits = {s: _split(arrays[s], arrays.get(f"{s}_label"), s, path) for s in SPLITS}
        _check_agreement(splits, path)
        _warn_of_leaks(splits, path)
        splits = {name: split.take(_mixed_order(len(split), name, split.label)) for name, split in splits.items()}
    else:
        whole = _split(arrays["x"], arrays.get("label", arrays.get("y")), "x", path)
        splits = _cut(whole, path)
    labels = [split.label for split in splits.values() if split.label is not None]
    return splits, _num_classes(torch.cat(labels) if labels else None, num_classes, path)


def _cut(whole: Split, path: Path) -> dict[str, Split]:
    """Train, val and test of data that came in one piece; copies of an image stay together."""
    first = first_copies(whole.values)
    originals = first.unique()
    if len(originals) < MIN_SAMPLES:
        _warn(f"{path}: holds only {len(originals)} different images; every split repeats them, so scores mean nothing")
        first = originals = torch.arange(len(whole))
    elif copies := len(whole) - len(originals):
        _warn(f"{path}: {copies} images are copies of others; copies were put into the split of the first")
    label = None if whole.label is None else whole.label[originals]
    order = cut_order(len(originals), "flowbench/user/1", len(originals) // 10, len(originals) // 10, label)
    splits = {}
    for name in SPLITS:
        members = torch.isin(first, originals[order[name]]).nonzero()[:, 0]
        labels = None if whole.label is None else whole.label[members]
        splits[name] = whole.take(members[_mixed_order(len(members), name, labels)])
    return splits


def _warn_of_leaks(splits: dict[str, Split], path: Path) -> None:
    found = leaks({name: split.values for name, split in splits.items()})
    if found:
        shared = ", ".join(f"{count} of {later} in {earlier}" for (earlier, later), count in found.items())
        _warn(f"{path}: images lie in two splits ({shared}); scores will flatter a memoriser")


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)


def _mixed_order(num: int, name: str, label: Tensor | None) -> Tensor:
    """An order whose every prefix holds all classes: folders come sorted, and evaluation takes prefixes."""
    return stratified_order(num, f"flowbench/user/1/{name}", label)


def _split(values: Tensor, label: Tensor | None, key: str, path: Path) -> Split:
    least = MIN_SAMPLES if key in ("x", "train") else 1
    values = _checked_values(values, key, path)
    if len(values) < least:
        raise ValueError(f"{path}: {key!r} holds {len(values)} samples; at least {least} are needed")
    return Split(values, None if label is None else _checked_label(label, len(values), key, path))


def _checked_values(values: Tensor, key: str, path: Path) -> Tensor:
    """Values as uint8 (N, C, H, W) or float32 (N, *D)."""
    where = f"{path}: {key!r} of shape {tuple(values.shape)} and type {str(values.dtype).removeprefix('torch.')}"
    if values.dtype == torch.uint8:
        if values.ndim not in (3, 4):
            raise ValueError(f"{where}: uint8 means images (N, C, H, W) or (N, H, W); save vectors as float32")
        values = values[:, None] if values.ndim == 3 else values
    elif values.dtype in (torch.float32, torch.float64):
        if values.ndim not in (2, 4):
            raise ValueError(f"{where}: floats must be vectors (N, d) or images (N, C, H, W)")
        values = values.float()
        _check_floats(values, where)
    else:
        raise ValueError(f"{where}: expected uint8 for images, float32 or float64 for other values")
    if 0 in values.shape[1:]:
        raise ValueError(f"{where}: a dimension is empty")
    if values.ndim == 4 and values.shape[1] > 4 >= values.shape[3]:
        raise ValueError(f"{where}: channels seem to come last; transpose to (N, C, H, W)")
    return values.contiguous()


def _check_floats(values: Tensor, where: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{where}: {bad} values are NaN or infinite; clean the data first")
    if values.ndim == 4 and values.numel() and values.abs().max() > 1.0:
        low, high = float(values.min()), float(values.max())
        raise ValueError(f"{where}: float images must lie in [-1, 1], found {low:g} to {high:g}; rescale or save uint8")


def _checked_label(label: Tensor, num: int, key: str, path: Path) -> Tensor:
    """Labels as int64 (N,)."""
    where = f"{path}: labels of {key!r}"
    if label.dtype.is_floating_point or label.dtype.is_complex or label.dtype == torch.bool:
        raise ValueError(f"{where} must be integers, got {str(label.dtype).removeprefix('torch.')}")
    if tuple(label.shape) != (num,):
        raise ValueError(f"{where} must have shape ({num},), got {tuple(label.shape)}; give one per sample")
    return label.long()


def _declared_classes(value: Tensor | None, path: Path) -> int | None:
    if value is None:
        return None
    if value.numel() != 1 or value.dtype.is_floating_point or int(value) < 1:
        raise ValueError(f"{path}: 'num_classes' must be one positive integer, got {value.tolist()}")
    return int(value)


def _num_classes(label: Tensor | None, declared: int | None, path: Path) -> int | None:
    """Number of classes K; labels must be 0..K-1 and, unless K is declared, use each of them."""
    if label is None:
        if declared is not None:
            raise ValueError(f"{path}: 'num_classes' is {declared} but there are no labels; remove it or add 'label'")
        return None
    found = label.unique()
    low, high = int(found[0]), int(found[-1])
    if low < 0 or (declared is not None and high >= declared):
        top = high if declared is None else declared - 1
        raise ValueError(f"{path}: labels out of range: found {low} to {high}, expected 0 to {top}")
    if declared is None and len(found) != high + 1:
        raise ValueError(
            f"{path}: labels out of range: {len(found)} different values from {low} to {high}, expected 0 to "
            f"{len(found) - 1}; renumber them or declare 'num_classes'"
        )
    return high + 1 if declared is None else declared


def _kind(split: Split) -> str:
    """What a sample is, for messages."""
    return f"{str(split.values.dtype).removeprefix('torch.')} samples of shape {tuple(split.values.shape[1:])}"


def _check_agreement(splits: dict[str, Split], path: Path) -> None:
    first = splits["train"]
    for name, split in splits.items():
        if split.values.shape[1:] != first.values.shape[1:] or split.values.dtype != first.values.dtype:
            raise ValueError(f"{path}: {name!r} holds {_kind(split)}, 'train' holds {_kind(first)}; make them agree")
        if (split.label is None) != (first.label is None):
            raise ValueError(f"{path}: give '{name}_label' and 'train_label' both or neither")
