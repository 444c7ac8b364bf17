"""Progress of a preparation, in a file for the process that waits for it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

__all__ = ["PROGRESS_FILE", "note_progress"]

PROGRESS_FILE = "FLOWBENCH_PROGRESS"
"""Environment variable with the file; processes that a preparation starts inherit it, and write there too."""

INTERVAL = 1.0  # seconds between two notes of one process

_last = 0.0


def note_progress(what: str, done: float, total: float = 1.0) -> None:
    """Note what is being prepared and how far it is, at most once a second; nothing without ``FLOWBENCH_PROGRESS``.

    Args:
        what: for people, e.g. ``training the classifier digits-cnn``.
        done: so much of it is done.
        total: so much there is.
    """
    global _last
    path = os.environ.get(PROGRESS_FILE)
    now = time.monotonic()
    if not path or now - _last < INTERVAL:
        return
    _last = now
    partial = Path(f"{path}.{os.getpid()}")
    try:
        partial.write_text(json.dumps({"what": what, "fraction": done / total if total else 0.0}), encoding="utf-8")
        partial.replace(path)
    except OSError:  # only a display: a full disk must not end the work
        partial.unlink(missing_ok=True)
