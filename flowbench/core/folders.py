"""Listing of a folder, shared by data, samples and identities, with what is left out."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CLASS_FOLDERS", "IMAGE_SUFFIXES", "FolderContents", "list_folder", "printable"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
"""Names of the image formats that are read, lower-case."""

CLASS_FOLDERS = 2
"""Levels of a folder of images with one subfolder per class."""

# macOS puts its resource files here when it makes a zip archive.
_RESOURCES = "__MACOSX"
_SHOWN_SUFFIXES = 4

_Identity = tuple[int, int]


@dataclass
class FolderContents:
    """Files and folders below a folder, and a count of everything else.

    Attributes:
        files: the files with a wanted suffix, in the order of their relative paths, part by part.
        folders: the visible folders, in the same order; those at the deepest level of the request are listed
            without being entered.
        hidden: files and folders whose names begin with a dot, and macOS's resource folders.
        others: visible files without a wanted suffix, counted by suffix ("" for none), and pipes or devices.
        repeated: files that are reached once more, through a link.
    """

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    hidden: int = 0
    others: Counter[str] = field(default_factory=Counter)
    repeated: int = 0

    def remark(self) -> str:
        """Entries that were left out or found twice, as text; empty without any."""
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        if self.others:
            most = [suffix or "no suffix" for suffix, _ in self.others.most_common(_SHOWN_SUFFIXES)]
            dots = ", ..." if len(self.others) > _SHOWN_SUFFIXES else ""
            parts.append(f"{self.others.total()} of other kinds ({', '.join(most)}{dots})")
        remarks = [f"left out: {', '.join(parts)}"] if parts else []
        if self.repeated:
            remarks.append(f"{self.repeated} found again through links")
        return "; ".join(remarks)


def list_folder(
    folder: Path, *, suffixes: Collection[str] | None = IMAGE_SUFFIXES, depth: int | None = None
) -> FolderContents:
    """List a folder and its subfolders; links are followed.

    Hidden files and folders (a leading dot, ``__MACOSX``) and files with other suffixes are left out and counted.
    Whatever would lose a file without a word is refused: a link that leads nowhere, which may stand for an image or a
    whole class; a folder that cannot be read; a link back to a folder that it lies in.

    Args:
        folder: where to begin.
        suffixes: lower-case suffixes of the wanted files, compared in lower case; None takes every file.
        depth: levels to enter, 1 is the folder alone; None is all.

    Raises:
        ValueError: one line, for what is refused.
    """
    walk = _Walk(suffixes, FolderContents())
    walk.visit(folder, [_identity(_stat(folder))], depth, linked=False)
    walk.found.repeated = sum(walk.seen[identity] > 1 for identity in walk.through_links)
    return walk.found


def printable(path: Path | str) -> str:
    r"""A path as UTF-8 text; bytes that are none appear as ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass
class _Walk:
    suffixes: Collection[str] | None
    found: FolderContents
    seen: Counter[_Identity] = field(default_factory=Counter)
    through_links: list[_Identity] = field(default_factory=list)

    def visit(self, folder: Path, above: list[_Identity], depth: int | None, linked: bool) -> None:
        for name in _names(folder):
            path = folder / name
            if name.startswith(".") or name == _RESOURCES:
                self.found.hidden += 1
                continue
            status, is_link = _stat(path), path.is_symlink()
            if stat.S_ISDIR(status.st_mode):
                self.found.folders.append(path)
                if depth is None or depth > 1:
                    inner = _below(path, status, above)
                    self.visit(path, inner, None if depth is None else depth - 1, linked or is_link)
            elif stat.S_ISREG(status.st_mode) and self._wants(path):
                self.found.files.append(path)
                self.seen[_identity(status)] += 1
                if linked or is_link:
                    self.through_links.append(_identity(status))
            else:
                self.found.others[path.suffix.lower() if stat.S_ISREG(status.st_mode) else "pipe or device"] += 1

    def _wants(self, path: Path) -> bool:
        return self.suffixes is None or path.suffix.lower() in self.suffixes


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(
            f"{printable(folder)}: folder cannot be read ({error.strerror}); change its permissions"
        ) from error


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise ValueError(
                f"{printable(path)}: is a link that leads nowhere ({printable(os.readlink(path))}); restore what it "
                "stands for, or remove it"
            ) from error
        raise ValueError(f"{printable(path)}: cannot be read ({error.strerror}); change its permissions") from error


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _below(path: Path, status: os.stat_result, above: list[_Identity]) -> list[_Identity]:
    """The folders that contain what lies in a folder, itself included."""
    if _identity(status) in above:
        raise ValueError(f"{printable(path)}: is a link back to a folder that it lies in; remove it")
    return [*above, _identity(status)]
