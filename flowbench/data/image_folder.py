"""A folder of images, one subfolder per class."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flowbench.core.folders import CLASS_FOLDERS, IMAGE_SUFFIXES, list_folder, printable

__all__ = ["FoundImages", "read_image", "read_image_folder"]

_GREY = {"1", "L", "LA", "La"}
# Pillow's names of deep pixels: modes I, I;16, F and raw modes such as RGB;16B (but BGR;16 is 5-6-5 bits).
_DEEP = re.compile(r";(16|32)[A-Z]|^[IF]")


@dataclass(frozen=True)
class FoundImages:
    """The images of a folder.

    Attributes:
        values: uint8 (N, C, H, W).
        label: int64 (N,), or None without class folders.
        remark: what was left out of the folder, or is there twice; see
            :class:`flowbench.core.folders.FolderContents`.
    """

    values: np.ndarray
    label: np.ndarray | None
    remark: str


def read_image_folder(path: Path, image_size: int | None = None) -> FoundImages:
    """Read all images of a folder into one array, decoding one image at a time.

    Subfolders are classes, numbered in the order of their names; a folder without subfolders gives unlabelled images.
    Files are taken in the order of their names. What becomes of the odd ones:

    - hidden files and folders, and files without an image suffix: left out and counted;
    - links to files and folders: followed; links that lead nowhere or back: refused;
    - grey among colour: all become RGB; the result is grey when every image is;
    - transparency (RGBA, LA, palettes): laid over white, as a viewer shows it on paper;
    - CMYK, palettes, other colour spaces: converted to RGB by Pillow, without colour profiles;
    - several frames: the first; EXIF rotation: applied;
    - more than 8 bits per channel, truncated or unreadable files, empty classes, images beside class folders, folders
      inside class folders, class folders whose names differ in case alone, several sizes without ``image_size``:
      refused, because guessing would change the data.

    Args:
        path: the folder.
        image_size: scale the shorter side to this many pixels (bicubic, antialiased) and keep the centre
            square;
            None: images are taken as they are and must have one size.

    Returns:
        The images.

    Raises:
        ValueError: one line that names the file, for whatever is refused.
    """
    if not path.is_dir():
        raise ValueError(f"{printable(path)}: expected a folder of images, got a file")
    contents = list_folder(path, depth=CLASS_FOLDERS)
    files, label = contents.files, _labels(path, contents.files, contents.folders)
    # The headers give the mode that all images share, so that no more than one decoded image is held besides the array.
    mode = "L" if all(_is_grey(file) for file in files) else "RGB"
    first = read_image(files[0], mode, image_size)
    values = np.empty((len(files), 1 if mode == "L" else 3, first.height, first.width), dtype=np.uint8)
    for row, file in zip(values, files, strict=True):
        image = read_image(file, mode, image_size)
        if image.size != first.size:
            raise ValueError(
                f"{printable(file)}: is {_size(image)} pixels, but {printable(files[0].name)} is {_size(first)}; "
                "set image_size"
            )
        row[:] = np.asarray(image) if mode == "L" else np.asarray(image).transpose(2, 0, 1)
    return FoundImages(values, None if label is None else np.array(label), contents.remark())


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _labels(path: Path, files: Sequence[Path], folders: Sequence[Path]) -> list[int] | None:
    """The class of each image by the folder it lies in; None without class folders."""
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    classes = [folder for folder in folders if folder.parent == path]
    if not classes:
        if not files:
            raise ValueError(f"{printable(path)}: holds no images ({kinds})")
        return None
    loose = next((file for file in files if file.parent == path), None)
    if loose is not None:
        raise ValueError(
            f"{printable(path)}: holds both images ({printable(loose.name)}) and subfolders "
            f"({printable(classes[0].name)}); sort them"
        )
    _check_names(path, classes)
    held = {file.parent for file in files}
    for folder in classes:
        if folder not in held:
            raise ValueError(f"{printable(folder)}: class folder holds no images ({kinds})")
    nested = next((folder for folder in folders if folder.parent != path), None)
    if nested is not None:
        raise ValueError(
            f"{printable(nested.parent)}: class folder holds a folder ({printable(nested.name)}); move its images up"
        )
    number = {folder: index for index, folder in enumerate(classes)}
    return [number[file.parent] for file in files]


def _check_names(path: Path, classes: Sequence[Path]) -> None:
    """Refuse classes that are one folder on other machines, where names ignore case or accents are composed."""
    seen: dict[str, str] = {}
    for name in (folder.name for folder in classes):
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ValueError(
                f"{printable(path)}: class folders {printable(other)} and {printable(name)} differ only in how they "
                "are written; rename or merge one"
            )


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
            # Pillow would cut 16-bit colour to 8 bits without a warning; the tiles show how the pixels are stored.
            stored = [opened.mode, *(str(tile[3]) for tile in opened.tile)]
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Decoders raise nearly anything on broken bytes.
        raise _unreadable(file, error) from error
    if any(_DEEP.search(text) for text in stored):
        raise ValueError(
            f"{printable(file)}: has more than 8 bits per channel (mode {stored[0]}); convert it to 8 bits"
        )
    image = _opaque(image).convert(mode)
    return image if image_size is None else _square(image, image_size)


def _unreadable(file: Path, error: Exception) -> ValueError:
    if isinstance(error, PermissionError):
        return ValueError(f"{printable(file)}: image cannot be read ({error.strerror}); change its permissions")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{printable(file)}: image cannot be read ({reason}); repair or remove it")


def _opaque(image: Image.Image) -> Image.Image:
    """The image over white where it has an alpha channel or a transparent colour."""
    if not image.has_transparency_data:
        return image
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The centre square of ``size`` pixels, after scaling the shorter side to it."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
