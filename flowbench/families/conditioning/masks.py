"""Masks of inpainting: which values of an image or a point are unknown."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowbench.core.places import expand
from flowbench.core.seeds import generator

__all__ = ["MASKS", "make_mask"]

MASKS = "left, right, top, bottom, center, random-SHARE (e.g. random-0.5)"


def make_mask(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Which values are unknown.

    Args:
        name: `left`, `right`, `top`, `bottom` (half), `center` (the middle half of both sides), `random-SHARE` (so many
            pixels, the same for all images of a seed), or a PNG file whose bright pixels (>= 128) are unknown. Points
            take `left` (the first half of the coordinates), `right` and `random-SHARE`.
        shape: of one sample, (C, H, W) or (d,).
        seed: keys random masks.

    Returns:
        bool, shape (H, W) or (d,), True where unknown.

    Raises:
        ValueError: for an unknown name, a file of another size, or a mask that leaves nothing to do.
    """
    sides = shape[-2:] if len(shape) == 3 else shape[-1:]
    if name.startswith("random-"):
        mask = _random_mask(name, sides, seed)
    elif name.lower().endswith(".png"):
        mask = _mask_from_file(expand(name), sides)
    else:
        mask = _named_mask(name, sides)
    if not mask.any():
        raise ValueError(f"the mask {name} hides no value of shape {tuple(sides)}: there is nothing to inpaint")
    return mask


def _named_mask(name: str, sides: tuple[int, ...]) -> Tensor:
    width = sides[-1]
    regions: dict[str, tuple[slice, ...]] = {
        "left": (..., slice(width // 2)),  # type: ignore[dict-item]
        "right": (..., slice(width // 2, None)),  # type: ignore[dict-item]
    }
    if len(sides) == 2:
        height = sides[0]
        rows, columns = (slice(side // 4, side - side // 4) for side in sides)
        regions |= {
            "top": (slice(height // 2),),
            "bottom": (slice(height // 2, None),),
            "center": (rows, columns),
        }
    if name not in regions:
        kind = f"{MASKS} or a PNG file" if len(sides) == 2 else "left, right or random-SHARE for points"
        raise ValueError(f"unknown mask {name!r}: choose {kind}")
    mask = torch.zeros(sides, dtype=torch.bool)
    mask[regions[name]] = True
    return mask


def _random_mask(name: str, sides: tuple[int, ...], seed: int) -> Tensor:
    try:
        share = float(name.removeprefix("random-"))
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise ValueError(f"a random mask hides a share in (0, 1], e.g. random-0.5, got {name!r}")
    total = math.prod(sides)
    order = torch.randperm(total, generator=generator(seed, "mask"))
    mask = torch.zeros(total, dtype=torch.bool)
    mask[order[: round(share * total)]] = True
    return mask.view(sides)


def _mask_from_file(path: Path, sides: tuple[int, ...]) -> Tensor:
    if len(sides) != 2:
        raise ValueError(f"a PNG masks images, the data are points: use left, right or random-SHARE, got {path}")
    if not path.is_file():
        raise ValueError(f"there is no mask at {path}: name a PNG file, or choose {MASKS}")
    try:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): give a PNG file") from None
    if grey.shape != tuple(sides):
        raise ValueError(f"the mask {path} is {grey.shape[0]}x{grey.shape[1]}, the images are {sides[0]}x{sides[1]}")
    return torch.from_numpy(grey >= 128)
