"""Samples and summaries in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from flowbench.core.rows import Row
from flowbench.data import DataSpec

__all__ = ["image_grid", "log_hyperparameters", "log_pictures", "log_samples"]


def image_grid(images: Tensor, columns: int = 8, scale: int = 4) -> Tensor:
    """Lay images out row by row, enlarged without smoothing.

    Args:
        images: uint8, shape (N, C, H, W).
        columns: images per row.
        scale: pixels per pixel.

    Returns:
        uint8 picture, shape (C, rows * (H * scale + 2), columns * (W * scale + 2)), on black.
    """
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    padded = torch.nn.functional.pad(large, (1, 1, 1, 1))
    rows = -(-len(padded) // columns)
    blank = padded.new_zeros(rows * columns - len(padded), *padded.shape[1:])
    cells = torch.cat([padded, blank]).unflatten(0, (rows, columns))
    return cells.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)


def _scatter(points: Tensor, size: int = 256) -> Tensor:
    """A picture of 2-D points as a histogram, uint8, shape (1, size, size)."""
    points = points[points.isfinite().all(1)]
    reach = float(points.abs().max()) * 1.05 + 1e-6 if len(points) else 1.0
    histogram, _ = torch.histogramdd(points.double(), bins=size, range=[-reach, reach, -reach, reach])
    picture = (histogram / histogram.max().clamp(min=1)).sqrt()
    return (255 * picture.T.flip(0)).to(torch.uint8).unsqueeze(0)


def _writer(trainer: L.Trainer) -> Any:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger
    return None


def log_samples(trainer: L.Trainer, samples: Tensor, spec: DataSpec, tag: str, step: int) -> None:
    """Write a picture of samples in model space, where the run has a TensorBoard logger."""
    logger = _writer(trainer)
    if logger is None:
        return
    if spec.modality == "image":
        picture = image_grid(spec.to_uint8(samples.cpu().nan_to_num(-1.0)))
    elif spec.num_dims == 2:
        picture = _scatter(samples.cpu())
    else:
        return
    channels = picture.shape[0]
    logger.experiment.add_image(tag, picture if channels in (1, 3) else picture[:1], step)


def log_pictures(trainer: L.Trainer, pictures: Mapping[str, Tensor], tag: str, step: int) -> None:
    """Write pictures, uint8 (C, H, W), where the run has a TensorBoard logger."""
    logger = _writer(trainer)
    for name, picture in pictures.items() if logger is not None else ():
        logger.experiment.add_image(f"{tag}/{name}", picture, step)


def log_hyperparameters(trainer: L.Trainer, rows: Sequence[Row], identity: dict[str, Any]) -> None:
    """One line of the HParams table: who it is, and its metrics outside the sweep."""
    logger = _writer(trainer)
    if logger is None:
        return
    known = [row for row in rows if row.value is not None and row.status == "ok" and not row.axis]
    metrics = {f"test/{row.metric}": row.value for row in known}
    family = rows[0].family if rows else ""
    logger.log_hyperparams({**identity, "family": family}, metrics)
