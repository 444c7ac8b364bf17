"""A folder of images, one subfolder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["SUFFIXES", "read_image_folder"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def read_image_folder(path: Path, image_size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Read all images of a folder into memory.

    Subfolders are classes, numbered in the order of their names; a folder without subfolders gives unlabelled
    images. Files are taken in the order of their names; hidden files and files without an image suffix are
    passed over. Images are grey when all are grey, else RGB (an alpha channel is dropped). EXIF rotation is
    applied.

    Args:
        path: the folder.
        image_size: scale the shorter side to this many pixels (bicubic, antialiased) and keep the centre
            square;
            None: images are taken as they are and must have one size.

    Returns:
        uint8 (N, C, H, W) and labels int64 (N,) or None.

    Raises:
        ValueError: one line, for no folder, no images, an unreadable image, 16-bit images, or several sizes.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder of images, got a file")
    files, label = _list_images(path)
    images = [_read(file, image_size) for file in files]
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    for file, image in zip(files, images, strict=True):
        if image.size != images[0].size:
            raise ValueError(
                f"{file}: is {_size(image)} pixels, but {files[0].name} is {_size(images[0])}; set image_size"
            )
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])
    values = torch.from_numpy(pixels)
    values = values[:, None] if mode == "L" else values.permute(0, 3, 1, 2).contiguous()
    return values, None if label is None else torch.tensor(label)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _list_images(path: Path) -> tuple[list[Path], list[int] | None]:
    """Image files and their class ids."""
    visible = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    loose = _images_in(visible)
    classes = [p for p in visible if p.is_dir()]
    if not classes:
        if not loose:
            raise ValueError(f"{path}: holds no images ({', '.join(sorted(SUFFIXES))})")
        return loose, None
    if loose:
        raise ValueError(f"{path}: holds both images ({loose[0].name}) and subfolders ({classes[0].name}); sort them")
    files: list[Path] = []
    label: list[int] = []
    for number, folder in enumerate(classes):
        found = _images_in(sorted(p for p in folder.iterdir() if not p.name.startswith(".")))
        if not found:
            raise ValueError(f"{folder}: class folder holds no images ({', '.join(sorted(SUFFIXES))})")
        files += found
        label += [number] * len(found)
    return files, label


def _images_in(files: list[Path]) -> list[Path]:
    return [p for p in files if p.is_file() and p.suffix.lower() in SUFFIXES]


def _read(file: Path, image_size: int | None) -> Image.Image:
    """One image, decoded, upright, in mode L or RGB."""
    try:
        with Image.open(file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Decoders raise nearly anything on broken bytes.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: image cannot be read ({reason}); repair or remove it") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{file}: has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    return image if image_size is None else _square(image, image_size)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The centre square of ``size`` pixels, after scaling the shorter side to it."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
