"""The catalogue: datasets by name, and the door for a user's own data."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import cast

from flowbench.core.checks import check_count, check_counts
from flowbench.core.nearest import nearest
from flowbench.core.places import expand
from flowbench.data.dataset_entry import DatasetEntry
from flowbench.data.declaration import Declaration
from flowbench.data.discovery import offers_of_others, own_offers
from flowbench.data.spec import DataSpec
from flowbench.data.user_formats import USER_FORMATS

__all__ = ["check", "check_declaration", "declared_spec", "get", "list_datasets", "register"]

_entries: dict[str, DatasetEntry] = {}


def register(entry: DatasetEntry) -> DatasetEntry:
    """Add a dataset to the catalogue.

    Args:
        entry: the dataset.

    Returns:
        The entry.

    Raises:
        ValueError: when the name is taken.
    """
    if entry.name in _entries or entry.name in USER_FORMATS:
        raise ValueError(f"dataset: the name {entry.name!r} is taken; choose another one")
    _entries[entry.name] = entry
    return entry


def list_datasets() -> list[DatasetEntry]:
    """All entries by name, those of other packages included; a line on stderr for each that cannot be loaded.

    A user's own data come under the names in ``USER_FORMATS``.
    """
    _say(_load_others())
    return [_entries[name] for name in sorted(_entries)]


@cache
def _load_others() -> tuple[str, ...]:
    """Add the data sets of other packages, once; one line for each offer that cannot be."""
    offers, faults = offers_of_others()
    for offer in offers:
        try:
            for entry in offer.entries():
                register(entry)
        except ValueError as error:
            line = str(error)
            faults.append(line if offer.package in line else f"{offer}: {line}")
    return tuple(faults)


@cache
def _say(lines: tuple[str, ...]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def check(
    name: str,
    path: str | Path | None = None,
    image_size: int | None = None,
    random_flip: bool = False,
    declared: Declaration | None = None,
) -> None:
    """Refuse a request that :func:`get` could not serve, without reading data.

    Args:
        name: a name of the catalogue or of ``USER_FORMATS``.
        path: the user's file or folder.
        image_size: see :func:`flowbench.data.image_folder.read_image_folder`.
        random_flip: whether training images shall be mirrored. (Not checked for the user's own data.)
        declared: what the user declares of the values of own data.

    Raises:
        ValueError: for an unknown name, a missing path, or an option that the dataset does not use.
    """
    _check_name(name)
    path = None if path is None else expand(path)
    if name in _entries and path is not None:
        raise ValueError(f"path: the dataset {name!r} takes none, got {str(path)!r}; remove it")
    if name in USER_FORMATS and path is None:
        raise ValueError(f"path: the dataset {name!r} is your own data; set path to your {USER_FORMATS[name]}")
    if path is not None and not expand(path).exists():
        raise ValueError(f"path: {str(path)!r} does not exist (working directory {str(Path.cwd())!r})")
    if path is not None and not (path.is_file() or path.is_dir()):
        raise ValueError(f"path: {str(path)!r} is neither a file nor a folder")
    if image_size is not None and name != "image_folder":
        raise ValueError(f"image_size: only 'image_folder' resizes, {name!r} does not; remove it")
    if declared is not None and declared.given and name in _entries:
        option = declared.given[0]
        raise ValueError(f"{option}: the catalogue knows the values of {name!r}; remove {option}")
    check_count("image_size", image_size, at_most=2**16, or_none=True, hint="pixels a side")
    if random_flip and name in _entries:
        _check_flips(_entries[name])


def check_declaration(name: str, shape: tuple[int, ...] | None = None, num_classes: int | None = None) -> None:
    """Refuse a shape or classes where the catalogue has them, or classes without a shape.

    Args:
        name: a name of the catalogue or of ``USER_FORMATS``.
        shape: declared shape of one sample, (d,) or (C, H, W).
        num_classes: declared number of classes.

    Raises:
        ValueError: for a declaration that is empty or incomplete.
    """
    _check_name(name)
    if shape is not None:
        check_counts("shape", shape, at_most=10**6, hint="of one sample, (d,) or (C, H, W)")
    check_count("num_classes", num_classes, at_most=10**6, or_none=True)
    if name in _entries and (shape is not None or num_classes is not None):
        raise ValueError(f"shape: the catalogue knows shape and classes of {name!r}; remove shape and num_classes")
    if shape is None and num_classes is not None:
        raise ValueError(f"num_classes: declared as {num_classes} without shape; declare both")


def declared_spec(
    name: str, shape: tuple[int, ...] | None = None, num_classes: int | None = None, levels: int | None = None
) -> DataSpec:
    """The specification of a dataset before any of it is read.

    Args:
        name: as in :func:`check_declaration`.
        shape: as in :func:`check_declaration`.
        num_classes: as in :func:`check_declaration`.
        levels: of the grid of a user's own data; None is 256 for images, no grid for vectors.

    Returns:
        The catalogue's entry; for a user's own data what is declared.

    Raises:
        ValueError: for a user's own data without a declared shape, and as :func:`check_declaration`.
    """
    check_declaration(name, shape, num_classes)
    if name in _entries:
        return cast(DataSpec, _entries[name].spec)  # as FlowDataModule.spec
    if shape is None:
        raise ValueError(
            f"data.shape: the shape of {name!r} is known only once it is read; declare it, e.g. "
            "data.shape=[3,64,64], and data.num_classes where it is labelled"
        )
    return DataSpec(name, "declared", tuple(shape), num_classes, levels or (256 if len(shape) == 3 else None))


def _check_name(name: str) -> None:
    if name in _entries or name in USER_FORMATS:
        return
    faults = "".join(f"; {line}" for line in _load_others())
    known = [*sorted(_entries), *USER_FORMATS]
    if name not in known:
        # "CIFAR-10" is how people write it; the nearest name by letters alone would be none.
        plain = name.lower().replace("-", "_")
        near = nearest(plain, known)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(f"dataset: unknown name {name!r}; {hint}known: {', '.join(known)}{faults}")


def _check_flips(entry: DatasetEntry) -> None:
    if not entry.spec.grid:
        held = entry.spec.summary.split()[0]
        raise ValueError(f"random_flip: {entry.name!r} holds {held}, which have no mirror image; set it to False")
    if not entry.flips:
        raise ValueError(f"random_flip: a mirror image of {entry.name!r} is no sample of it; set it to False")


def get(
    name: str,
    path: str | Path | None = None,
    image_size: int | None = None,
    random_flip: bool = False,
    declared: Declaration | None = None,
) -> DatasetEntry:
    """The entry of a dataset; a user's own data are read and checked here.

    Args:
        name: a name of the catalogue, or ``npz``, ``npy``, ``pt`` or ``image_folder``.
        path: the user's file or folder, only with those four.
        image_size: side of the square images in pixels, only with ``image_folder``.
        random_flip: see :func:`check`.
        declared: see :func:`check`.

    Returns:
        The entry.

    Raises:
        ValueError: see :func:`check`, and :func:`flowbench.data.user_data.open_user_data` for what data may
            hold.
    """
    check(name, path, image_size, random_flip, declared)
    if path is None:
        return _entries[name]
    from flowbench.data.user_data import open_user_data  # reads files with libraries that a list does not need

    entry = open_user_data(name, expand(path), image_size, declared)
    if random_flip:
        _check_flips(entry)
    return entry


# Other packages are imported only when a name is not ours, or all are listed.
for _offer in own_offers():
    for _entry in _offer.entries():
        register(_entry)
