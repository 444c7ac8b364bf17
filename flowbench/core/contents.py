"""Hashes of the content of a user's own files, independent of names and dates."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from flowbench.core.folders import list_folder, printable
from flowbench.core.places import cache_dir

__all__ = ["content_of"]

# A file that was changed this recently may be changed again within the clock's resolution: its hash is not remembered.
SETTLED_NS = 2_000_000_000
# Reading more than this takes seconds, which are announced.
ANNOUNCED_BYTES = 2**30
_FORMAT = 1

_Stamp = list[int]


@dataclass(frozen=True)
class _File:
    """A file with the stamp by which a change is noticed without reading it."""

    path: Path
    stamp: _Stamp

    @classmethod
    def of(cls, path: Path) -> _File:
        # The time of the last change of the inode cannot be set, as that of the content can (cp -p, touch -r).
        found = path.stat()
        return cls(path, [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev])


def content_of(path: Path, suffixes: Collection[str] | None = None, depth: int | None = None) -> str:
    """The identity of what a file holds, or of all visible files of a folder with their relative names.

    A hash that was computed before is taken from the cache while size, dates and inode of a file stay as they were, so
    only what is new or changed is read.

    Args:
        path: a file or a folder.
        suffixes: of a folder, only the files with these suffixes count; None counts all.
        depth: of a folder, levels that count; None counts all.

    Returns:
        ``sha256:`` and 16 hex digits.

    Raises:
        ValueError: one line: a file or folder that cannot be read, or that changes while it is read.
    """
    names = [""]
    if path.is_dir():
        names = [os.path.relpath(file, path) for file in list_folder(path, suffixes=suffixes, depth=depth).files]
    try:
        files = {name: _File.of(path / name if name else path) for name in names}
        known = _read_cache(path)
        fresh = {name: file for name, file in files.items() if known.get(name, [None])[0] != file.stamp}
        _announce(path, fresh)
        digests = {name: _hash(file) if name in fresh else known[name][1] for name, file in files.items()}
    except OSError as error:
        where = printable(error.filename or path)
        raise ValueError(f"{where}: cannot be read ({error.strerror}); change its permissions") from error
    if fresh or len(known) != len(files):
        _write_cache(path, {name: (file.stamp, digests[name]) for name, file in files.items() if _is_settled(file)})
    return f"sha256:{_combined(digests, path.is_dir())[:16]}"


def _combined(digests: dict[str, str], is_folder: bool) -> str:
    if not is_folder:
        return digests[""]
    total = hashlib.sha256()
    for name, digest in digests.items():
        total.update(os.fsencode(name) + b"\0" + digest.encode() + b"\n")
    return total.hexdigest()


def _hash(file: _File) -> str:
    with file.path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if _File.of(file.path).stamp != file.stamp:
        raise ValueError(f"{printable(file.path)}: changes while it is read; wait until it is written")
    return digest


def _announce(path: Path, files: dict[str, _File]) -> None:
    size = sum(file.stamp[0] for file in files.values())
    if size > ANNOUNCED_BYTES:
        print(f"reading the {size / 1e9:.1f} GB of {printable(path)} once, to identify them", file=sys.stderr)


def _is_settled(file: _File) -> bool:
    return time.time_ns() - file.stamp[2] > SETTLED_NS


# ---- cache --------------------------------------------------------------------------------------------------


def _cache_file(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    return cache_dir() / "contents" / f"{key}.json"


def _read_cache(path: Path) -> dict[str, tuple[_Stamp, str]]:
    """Stamp and hash of every file that is known; nothing where the cache is absent or damaged."""
    try:
        record = json.loads(_cache_file(path).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            return {}
        return {str(name): (list(stamp), str(digest)) for name, (stamp, digest) in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, files: dict[str, tuple[_Stamp, str]]) -> None:
    """Remember hashes; a cache that cannot be written costs time, nothing else."""
    target = _cache_file(path)
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT, "files": files}, file)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
