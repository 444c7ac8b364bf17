"""Folders of this machine: the cache, the data sets, and the paths that users write.

The cache is the user's, not the working directory's, so that a classifier is trained and a file of weights fetched once
per machine. ``FLOWBENCH_CACHE`` and ``FLOWBENCH_DATA`` move cache and data sets; where one is set, no other place is
looked at.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock

__all__ = ["NO_ROOM", "cache_dir", "cached", "data_root", "data_roots", "expand", "locked", "writable"]

NO_ROOM = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk that is full or read-only."""

# Errors of a folder without permission, or of no folder.
_NO_FOLDER = frozenset({errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})

_CHECKOUT = Path(__file__).resolve().parents[2]


# Bytes that the file systems of Linux take, a path's without the zero at its end.
_LONGEST_NAME, _LONGEST_PATH = 255, 4_095


def expand(path: str | Path) -> Path:
    """A path as people write it, with ``~`` and ``~user`` replaced by the home folder.

    Raises:
        ValueError: there is no such user, or a name is longer than file systems take.
    """
    try:
        found = Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: has no home folder to stand for its ~; write the whole path") from None
    longest, whole = max((len(os.fsencode(part)) for part in found.parts), default=0), len(os.fsencode(found))
    if longest > _LONGEST_NAME or whole > _LONGEST_PATH:
        raise ValueError(
            f"{str(path)[:60]}... cannot name a file: its longest part has {longest} bytes of at most "
            f"{_LONGEST_NAME}, the whole {whole} of at most {_LONGEST_PATH}"
        )
    return found


def cache_dir() -> Path:
    """Folder of weights, classifiers, features, latents and required models.

    ``$FLOWBENCH_CACHE``, or ``flowbench`` in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux).
    """
    given = os.environ.get("FLOWBENCH_CACHE")
    return expand(given) if given else Path(platformdirs.user_cache_dir("flowbench", appauthor=False))


def cached(*parts: str) -> Path:
    """Path of a file or folder of the cache, present or not.

    Earlier versions kept the cache in ``data/cache``: what still lies there, in the working directory or the checkout,
    and nowhere else, is taken from there.

    Args:
        parts: of its path inside the cache.
    """
    path = cache_dir().joinpath(*parts)
    if os.environ.get("FLOWBENCH_CACHE") or path.exists():
        return path
    earlier = (folder.joinpath("cache", *parts) for folder in _local_data())
    return next((place for place in earlier if place.exists()), path)


def data_roots() -> list[Path]:
    """Folders that may hold data sets, in the order of looking: ``$FLOWBENCH_DATA`` alone where it is set.

    Else ``data`` in the working directory, ``data`` of the checkout that holds the package, and ``data`` in the cache.
    """
    given = os.environ.get("FLOWBENCH_DATA")
    return [expand(given)] if given else [*_local_data(), cache_dir() / "data"]


def data_root(name: str = "") -> Path:
    """The folder that holds a data set, or that is to receive it: the last of :func:`data_roots`.

    A folder ``<root>/<name>`` counts where it has the ``metadata.json`` of a fetched set; other people's folders may
    have the same name.

    Args:
        name: of the data set in the catalogue; empty for none in particular.
    """
    roots = data_roots()
    return next((root for root in roots if name and _holds(root, name)), roots[-1])


def _holds(root: Path, name: str) -> bool:
    return (root / name / "metadata.json").is_file() or (root / f"{name}.npz").is_file()


def _local_data() -> list[Path]:
    """``data`` here and in the checkout, as far as they exist."""
    return [folder for folder in dict.fromkeys((Path("data"), _CHECKOUT / "data")) if folder.is_dir()]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of something in the cache while it is made; other processes wait.

    Args:
        path: what is made; its folder is made when missing, the lock lies beside it.
        wait: for another process that holds it.

    Raises:
        ValueError: one line: the cache cannot be written.
        filelock.Timeout: another process holds it, and this one does not wait.
    """
    with writable(path.parent, "FLOWBENCH_CACHE"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
            yield


@contextmanager
def writable(folder: Path, variable: str) -> Iterator[None]:
    """Turn the error of a folder that is full or not writable into one line with the remedy; others pass.

    Args:
        folder: where is written.
        variable: the environment variable that names another folder.
    """
    try:
        yield
    except OSError as error:
        where = Path(error.filename or folder)
        if error.errno not in NO_ROOM | _NO_FOLDER or not _on_the_way(where, folder):
            raise
        raise ValueError(
            f"{where}: cannot be written ({error.strerror}); make room or set {variable} to a folder you can write"
        ) from error


def _on_the_way(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, or the folder in it: a fault elsewhere is not the folder's."""
    path, folder = path.absolute(), folder.absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)
