"""Input of ``flowbench predict``: samples of a split, or of a file that is checked value by value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowbench.commands.prediction.request import Request
from flowbench.core.seeds import generator
from flowbench.data import DataSpec, FlowDataModule
from flowbench.families import FlowModule

__all__ = ["BATCH", "Subjects", "find_subjects"]

BATCH = 256


@dataclass(frozen=True)
class Subjects:
    """Data that a task starts from, in model space on the flow's device, with labels where the flow is conditional."""

    x: Tensor
    label: Tensor | None
    shown_label: Tensor | None
    index: Tensor

    def batches(self, size: int = BATCH) -> Iterator[Subjects]:
        """In order, `size` at a time."""
        for rows in torch.arange(len(self.x)).split(max(1, size)):
            yield Subjects(self.x[rows], _rows(self.label, rows), _rows(self.shown_label, rows), self.index[rows])


def find_subjects(request: Request, module: FlowModule, data: FlowDataModule, seed: int) -> Subjects:
    """The images or points of a request; twice as many where pairs are wanted.

    Raises:
        ValueError: when there are fewer.
    """
    loaded = None if request.images is None else _from_file(request.images, data, seed)
    split = data.split(request.split)
    available, label = (len(split), split.label) if loaded is None else (len(loaded[0]), loaded[1])
    each = 2 if request.task == "interpolate" else 1
    number = available if request.num_samples is None else each * request.num_samples
    if number > available:
        source = request.images or f"the split {request.split}"
        raise ValueError(f"{source} has {available} samples, --task {request.task} wants {number}: lower --num-samples")
    x = data.model_values(request.split, slice(number)) if loaded is None else loaded[0][:number]
    label = None if label is None else label[:number].long()
    condition = None if label is None or module.num_classes is None else label.to(module.device)
    return Subjects(x.to(module.device), condition, label, torch.arange(number))


def _from_file(path: Path, data: FlowDataModule, seed: int) -> tuple[Tensor, Tensor | None]:
    """`x` and `label` of an npz file, in model space.

    Raises:
        ValueError: for a file that is missing, damaged, or holds something else.
    """
    spec = data.spec
    arrays = _read(path)
    x = _checked_samples(path, arrays.get("x"), spec)
    label = _checked_label(path, arrays["label"], len(x), spec) if "label" in arrays else None
    return (_from_uint8(x, spec, seed, data.dequantize) if spec.modality == "image" else spec.from_data(x)), label


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"there is no file at {path}: --images names an npz file with an array x")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("x", "label") if name in archive.files}
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged file.
        raise ValueError(f"{path} cannot be read as npz ({' '.join(str(error).split())[:120]})") from None


def _checked_samples(path: Path, x: np.ndarray | None, spec: DataSpec) -> Tensor:
    if x is None or x.shape[1:] != tuple(spec.shape) or x.ndim != len(spec.shape) + 1:
        found = "none" if x is None else x.shape
        raise ValueError(f"{path} needs an array x of shape (N, {', '.join(map(str, spec.shape))}), got {found}")
    wanted = np.dtype(np.uint8 if spec.modality == "image" or spec.levels is not None else np.float32)
    if x.dtype != wanted:
        raise ValueError(f"x of {path} must be {wanted}, got {x.dtype}")
    if not len(x):
        raise ValueError(f"x of {path} is empty: give at least one sample")
    broken = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
    if len(broken):
        raise ValueError(
            f"x of {path} must be finite, but {len(broken)} of {len(x)} samples hold NaN or infinity, first sample "
            f"{broken[0]}: take them out"
        )
    pixels = torch.from_numpy(x)
    if spec.modality == "image" and spec.levels is not None:
        off = pixels[spec.grid_to_uint8(_levels(pixels, spec.levels)) != pixels]
        if len(off):
            raise ValueError(
                f"x of {path} holds {int(off[0])}, but the {spec.levels} grey levels of {spec.name} are written as 0, "
                f"{255 // (spec.levels - 1)}, ..., 255: scale to 0..255 and round to the nearest of them"
            )
    return pixels


def _checked_label(path: Path, label: np.ndarray, number: int, spec: DataSpec) -> Tensor:
    if label.shape != (number,) or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"label of {path} must be {number} integers, got {label.dtype} of shape {label.shape}")
    low, high = int(label.min()), int(label.max())
    if spec.num_classes is not None and not 0 <= low <= high < spec.num_classes:
        raise ValueError(f"label of {path} must lie in 0..{spec.num_classes - 1}, got {low}..{high}")
    return torch.from_numpy(label.astype(np.int64))


def _from_uint8(pixels: Tensor, spec: DataSpec, seed: int, dequantize: str = "uniform") -> Tensor:
    """The inverse of :meth:`DataSpec.to_uint8`, placed in its bin as the data are where they have levels."""
    if spec.levels is None:
        return pixels.float() / 127.5 - 1.0
    level = _levels(pixels, spec.levels)
    return spec.dequantize(level, generator(seed, "images")) if dequantize == "uniform" else spec.to_model(level)


def _levels(pixels: Tensor, levels: int) -> Tensor:
    """Grey levels of 8-bit values: to_uint8 rounds k 255 / (levels - 1) down, and rounding up gives k back."""
    return (pixels.double() * (levels - 1) / 255).ceil().to(torch.uint8)


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows.to(values.device)]
