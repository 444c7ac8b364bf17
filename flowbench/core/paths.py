"""The paths that people write."""

from __future__ import annotations

from pathlib import Path

__all__ = ["expand"]


def expand(path: str | Path) -> Path:
    """A path as people write it, with ``~`` and ``~user`` replaced by the home folder.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: has no home folder to stand for its ~; write the whole path") from None
