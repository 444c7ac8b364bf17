"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["read_record", "write_atomic", "write_text"]


def write_atomic(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it.

    Args:
        path: the target; missing parent folders are made.
        write: receives the open binary file.

    Raises:
        OSError: the folder cannot be written or the disk is full, with the target's name; nothing is left behind.
        ValueError: the target is a folder, a device or a pipe, which a file must not replace.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise ValueError(f"{target}: {'is a folder' if target.is_dir() else 'is no regular file'}; give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary file must lie in the same folder: a rename is atomic only inside one file system.
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(target)  # the error of a full disk lacks the file
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; see :func:`write_atomic`."""
    write_atomic(path, lambda file: file.write(text.encode()))


def read_record(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one where there is no such file, or it holds something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
