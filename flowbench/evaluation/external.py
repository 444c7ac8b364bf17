"""Images that any code made, read a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowbench.core.contents import content_of
from flowbench.core.folders import IMAGE_SUFFIXES, list_folder, printable
from flowbench.data import DataSpec
from flowbench.data.array_files import ArrayFile
from flowbench.data.image_folder import read_image

__all__ = ["ExternalImages"]

# Names under which sample files carry their images: our own, and that of `np.savez(file, images)`.
KEYS = ("x", "arr_0", "samples", "images")
CHUNK = 256


class ExternalImages:
    """Images in a folder or in an .npz or .npy file.

    A folder is searched with its subfolders, see :func:`flowbench.core.folders.list_folder`. The images are taken as
    they are: a resize would change every metric, so images of another size are refused. Arrays are uint8, channels
    first or last. Files of a colour dataset may be grey and are replicated; files of a grey dataset may be colour
    pictures whose channels agree.

    Args:
        path: folder or file.
        spec: the data that they will be compared with.
        limit: take the first so many, in the order of the file or of the names; None takes all.

    Attributes:
        remark: one line of what was left out of a folder, or is there twice; empty where there is nothing to tell.

    Raises:
        ValueError: for anything else, in one line.
    """

    def __init__(self, path: Path, spec: DataSpec, limit: int | None = None) -> None:
        if spec.modality != "image":
            raise ValueError(f"only images can be scored from files; {spec.name} holds points of shape {spec.shape}")
        if not path.exists():
            raise ValueError(f"--samples: {str(path)!r} does not exist (working directory {str(Path.cwd())!r})")
        self.path, self.spec = path, spec
        contents = list_folder(path) if path.is_dir() else None
        self._files = None if contents is None else contents.files
        self._array = None if path.is_dir() else _read_array(path, spec)
        total = len(self._array) if self._array is not None else len(self._files or ())
        self._count = total if limit is None else min(limit, total)
        remark = "" if contents is None else contents.remark()
        if self._count < 2:
            left_out = f" ({remark})" if remark else ""
            raise ValueError(f"{printable(path)}: holds {total} images{left_out}; at least 2 are needed for a distance")
        self.remark = f"{printable(path)}: {total:,} images; {remark}" if remark else ""

    def __len__(self) -> int:
        """Number of images."""
        return self._count

    @property
    def content(self) -> str:
        """The identity of what the folder or file holds, see :func:`flowbench.core.contents.content_of`."""
        return content_of(self.path, IMAGE_SUFFIXES)

    def at(self, indices: Tensor) -> Tensor:
        """The images at some indices, uint8, shape (M, C, H, W)."""
        if self._array is not None:
            return torch.from_numpy(self._array[indices.numpy()])
        assert self._files is not None, "there is an array or there are files"
        return torch.stack([self._read(self._files[i]) for i in indices.tolist()])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and images (B, C, H, W), in order."""
        for index in torch.arange(len(self)).split(CHUNK):
            yield index, self.at(index)

    def _read(self, file: Path) -> Tensor:
        image = torch.from_numpy(np.array(read_image(file))).permute(2, 0, 1)
        if self.spec.shape[0] == 1:
            if not (torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])):
                raise ValueError(f"{printable(file)}: is a colour image, but {self.spec.name} is grey; convert it")
            image = image[:1]
        if tuple(image.shape) != self.spec.shape:
            raise ValueError(f"{printable(file)}: {_not_the_shape(tuple(image.shape), self.spec)}")
        return image


def _read_array(path: Path, spec: DataSpec) -> np.ndarray:
    """The array of a file as uint8 (N, C, H, W)."""
    file = ArrayFile.open("npz", path, mapped=True)
    names = [key for key in KEYS if key in file.names] or list(file.names)
    if not names:
        raise ValueError(f"{printable(path)}: holds no arrays; save uint8 images")
    if names[0] not in KEYS and len(names) > 1:
        raise ValueError(f"{printable(path)}: holds the arrays {', '.join(names)}; call the images 'x'")
    array = file.array(names[0], "save uint8 images")
    if array.dtype != np.uint8:
        raise ValueError(f"{printable(path)}: holds {array.dtype} of shape {array.shape}; save uint8 images, 0 to 255")
    channels, height, width = spec.shape
    if array.shape[1:] == (height, width) and channels == 1:
        return array[:, None]
    if array.shape[1:] == (height, width, channels) and array.shape[1:] != spec.shape:
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if array.shape[1:] != spec.shape:
        raise ValueError(f"{printable(path)}: {_not_the_shape(array.shape[1:], spec)}")
    return array


def _not_the_shape(found: tuple[int, ...], spec: DataSpec) -> str:
    return (
        f"images of shape {found}, but {spec.name} has {spec.shape} (channels, height, width); a resize changes "
        "every metric, so make them that size yourself and say how"
    )
