"""What a run leaves for the eye: samples.npz, trajectories.npz and the metrics' own pictures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from flowbench.core.storage import write_atomic
from flowbench.data import DataSpec

__all__ = ["save_pictures", "save_samples", "save_trajectories"]


def save_samples(run_dir: Path, samples: Tensor, spec: DataSpec, num_images: int) -> None:
    """Write samples.npz: `x` as uint8 images (N, C, H, W), or points (N, D) as the data's file holds them.

    Args:
        run_dir: the run's folder.
        samples: in model space, in the order of their noise indices; one that diverged is shown as black.
        spec: the data's shape and value grid.
        num_images: images to keep; points are kept all.
    """
    if spec.modality == "image":
        values = spec.to_uint8(samples[:num_images].cpu().nan_to_num(-1.0)).numpy()
    else:
        values = spec.to_data(samples.cpu() if spec.levels is None else samples.cpu().nan_to_num(-1.0)).numpy()
    write_atomic(run_dir / "samples.npz", lambda file: np.savez_compressed(file, x=values))


def save_trajectories(run_dir: Path, states: Tensor, times: Tensor) -> None:
    """Write trajectories.npz: `states` float32 (T, B, *D) in model space, as paths are measured, and `times` (T,)."""
    shown, grid = states.float().cpu().numpy(), times.cpu().numpy()
    write_atomic(run_dir / "trajectories.npz", lambda file: np.savez_compressed(file, states=shown, times=grid))


def save_pictures(run_dir: Path, pictures: Mapping[str, Tensor]) -> None:
    """Write pictures, uint8 (C, H, W) with one or three channels, as `<name>.png`."""
    for name, picture in pictures.items():
        pixels = picture.permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        write_atomic(run_dir / f"{name}.png", partial(image.save, format="PNG"))
