"""A folder of images, one subfolder per class."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["SUFFIXES", "read_image", "read_image_folder"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}

_GREY = {"1", "L", "LA", "La"}
# Pillow's names of deep pixels: modes I, I;16, F and raw modes such as RGB;16B (but BGR;16 is 5-6-5 bits).
_DEEP = re.compile(r";(16|32)[A-Z]|^[IF]")


def read_image_folder(path: Path, image_size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Read all images of a folder into one array, decoding one image at a time.

    Subfolders are classes, numbered in the order of their names; a folder without subfolders gives unlabelled images.
    Files are taken in the order of their names. What becomes of the odd ones:

    - hidden files and folders, and files without an image suffix: passed over;
    - grey among colour: all become RGB; the result is grey when every image is;
    - transparency (RGBA, LA, palettes): laid over white, as a viewer shows it on paper;
    - CMYK, palettes, other colour spaces: converted to RGB by Pillow, without colour profiles;
    - several frames: the first; EXIF rotation: applied;
    - more than 8 bits per channel, truncated or unreadable files, empty classes, images beside class folders, folders
      inside class folders, several sizes without ``image_size``: refused, because guessing would change the data.

    Args:
        path: the folder.
        image_size: scale the shorter side to this many pixels (bicubic, antialiased) and keep the centre
            square;
            None: images are taken as they are and must have one size.

    Returns:
        uint8 (N, C, H, W) and labels int64 (N,) or None.

    Raises:
        ValueError: one line that names the file, for whatever is refused.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder of images, got a file")
    files, label = _list_images(path)
    # The headers say which mode all images share, so that no more than one decoded image is held besides the array.
    mode = "L" if all(_is_grey(file) for file in files) else "RGB"
    first = read_image(files[0], mode, image_size)
    values = np.empty((len(files), 1 if mode == "L" else 3, first.height, first.width), dtype=np.uint8)
    for row, file in zip(values, files, strict=True):
        image = read_image(file, mode, image_size)
        if image.size != first.size:
            raise ValueError(f"{file}: is {_size(image)} pixels, but {files[0].name} is {_size(first)}; set image_size")
        row[:] = np.asarray(image) if mode == "L" else np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(values), None if label is None else torch.tensor(label)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _list_images(path: Path) -> tuple[list[Path], list[int] | None]:
    """Image files and their class ids."""
    loose, classes = _contents(path)
    if not classes:
        if not loose:
            raise ValueError(f"{path}: holds no images ({', '.join(sorted(SUFFIXES))})")
        return loose, None
    if loose:
        raise ValueError(f"{path}: holds both images ({loose[0].name}) and subfolders ({classes[0].name}); sort them")
    files: list[Path] = []
    label: list[int] = []
    for number, folder in enumerate(classes):
        found, nested = _contents(folder)
        if not found:
            raise ValueError(f"{folder}: class folder holds no images ({', '.join(sorted(SUFFIXES))})")
        if nested:
            raise ValueError(f"{folder}: class folder holds a folder ({nested[0].name}); move its images up")
        files += found
        label += [number] * len(found)
    return files, label


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Visible images and subfolders, each in the order of their names."""
    try:
        visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder}: folder cannot be read ({error.strerror}); change its permissions") from error
    images = [p for p in visible if p.is_file() and p.suffix.lower() in SUFFIXES]
    return images, [p for p in visible if p.is_dir()]


def _is_grey(file: Path) -> bool:
    """Whether an image has no colour, by its header."""
    try:
        with Image.open(file) as opened:
            return opened.mode in _GREY
    except Exception as error:  # Decoders raise nearly anything on broken bytes.
        raise _unreadable(file, error) from error


def read_image(file: Path, mode: str = "RGB", image_size: int | None = None) -> Image.Image:
    """One image, decoded, upright, opaque, in the given mode; see :func:`read_image_folder` for what is refused.

    Args:
        file: the image.
        mode: Pillow's name of the colour mode, ``L`` or ``RGB``.
        image_size: see :func:`read_image_folder`.

    Raises:
        ValueError: one line, for a file that cannot be read or has more than 8 bits per channel.
    """
    try:
        with Image.open(file) as opened:
            # Pillow would cut 16-bit colour to 8 bits without a word; the tiles tell how the pixels are stored.
            stored = [opened.mode, *(str(tile[3]) for tile in opened.tile)]
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Decoders raise nearly anything on broken bytes.
        raise _unreadable(file, error) from error
    if any(_DEEP.search(text) for text in stored):
        raise ValueError(f"{file}: has more than 8 bits per channel (mode {stored[0]}); convert it to 8 bits")
    image = _opaque(image).convert(mode)
    return image if image_size is None else _square(image, image_size)


def _unreadable(file: Path, error: Exception) -> ValueError:
    if isinstance(error, PermissionError):
        return ValueError(f"{file}: image cannot be read ({error.strerror}); change its permissions")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{file}: image cannot be read ({reason}); repair or remove it")


def _opaque(image: Image.Image) -> Image.Image:
    """The image over white where it has an alpha channel or a transparent colour."""
    if not image.has_transparency_data:
        return image
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The centre square of ``size`` pixels, after scaling the shorter side to it."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
