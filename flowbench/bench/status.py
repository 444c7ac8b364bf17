"""The state of one cell on disk: status.json, the lock of its process, and its progress.

The lock decides whether a process is alive: ``flock`` is released by the kernel however the process ends, so
there is no guessing from process ids.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flowbench.core.storage import read_record, write_text

__all__ = ["State", "Status", "lock_is_held", "move_aside", "read_progress", "read_status", "write_status"]

State = Literal["PENDING", "RUNNING", "DONE", "FAILED"]


@dataclass(frozen=True)
class Status:
    """State of a cell.

    Attributes:
        state: PENDING, RUNNING, DONE or FAILED.
        config_hash: hash of the experiment this state belongs to.
        attempts: processes started so far.
        exit_code: of the last attempt; negative: the signal that ended it.
        wall_seconds: duration of the last attempt.
        started: Unix seconds of the last start.
        log: path of the log, relative to the cell's directory.
        message: last line of the log of a failed attempt.
        jobs: cells that ran at once.
        threads: threads of the cell.
        names: bench, problem and contender that its rows are written under; None where no attempt noted them. Whoever
            reads the rows gives them the names of today.

    Example:
        >>> Status("DONE", config_hash="68b5a07487cb").is_done("68b5a07487cb")
        True
    """

    state: State = "PENDING"
    config_hash: str = ""
    attempts: int = 0
    exit_code: int | None = None
    wall_seconds: float | None = None
    started: float | None = None
    log: str = "log.txt"
    message: str = ""
    jobs: int | None = None
    threads: int | None = None
    names: list[str] | None = None

    def is_done(self, config_hash: str) -> bool:
        """Whether the cell is finished for this experiment."""
        return self.state == "DONE" and self.config_hash == config_hash

    def is_stale(self, config_hash: str) -> bool:
        """Whether the directory holds another experiment."""
        return self.config_hash not in ("", config_hash)


def read_status(directory: Path) -> Status:
    """The cell's status; a fresh PENDING one when there is none or it is damaged."""
    record = read_record(directory / "status.json")
    known = {key: value for key, value in record.items() if key in Status.__dataclass_fields__}
    return Status(**known)


def write_status(directory: Path, status: Status) -> None:
    """Write status.json atomically."""
    write_text(directory / "status.json", json.dumps(asdict(status), indent=2) + "\n")


def read_progress(directory: Path) -> dict[str, Any]:
    """The cell's progress.json, empty when there is none yet."""
    return read_record(directory / "progress.json")


def lock_is_held(directory: Path) -> bool:
    """Whether a live process holds the cell's lock."""
    try:
        handle = os.open(directory / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def move_aside(directory: Path) -> Path:
    """Rename a directory to the first free ``<name>.stale-<n>`` and return the new path."""
    number = 1
    while (target := directory.with_name(f"{directory.name}.stale-{number}")).exists():
        number += 1
    directory.rename(target)
    return target
