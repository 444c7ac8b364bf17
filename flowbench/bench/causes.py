"""Why a process of a bench ended, in one line for its user."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from flowbench.bench.machine import memory_limit
from flowbench.core.processes import how_it_ended

__all__ = ["explain", "last_line", "was_killed"]

# Signals by which a person or a batch system ends a process.
_REQUESTS = frozenset(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
_FULL = 2**20  # bytes: with less room than this, a disk is full for every purpose here


def signal_of(code: int) -> signal.Signals | None:
    """The signal that ended a process, or the child that it waited for; None where none did.

    Args:
        code: as ``Popen.returncode`` has it, or 128 + the number, as shells and this program's commands pass it on.
    """
    try:
        return signal.Signals(-code if code < 0 else code - 128)
    except ValueError:
        return None


def was_killed(code: int) -> bool:
    """Whether a process was ended by a signal that is no request: for want of memory, or by a fault of a library."""
    number = signal_of(code)
    return number is not None and number not in _REQUESTS


def explain(code: int, log: Path) -> str:
    """Why a process ended.

    Args:
        code: its ``Popen.returncode``, not 0.
        log: what it wrote.

    Returns:
        The last line of its log, or what is known where that line is not the reason.
    """
    said, number = last_line(log), signal_of(code)
    if number is None:
        reason = said or f"{how_it_ended(code)} and gave no reason"
    else:
        memory = _memory() if number.name == "SIGKILL" else ""
        reason = f"{how_it_ended(code)}{memory}" + (f"; its last line: {said}" if said else "")
    return f"{reason}; the disk is full: make room" if _is_full(log) else reason


def _memory() -> str:
    limit = memory_limit()
    known = f"there are {limit / 2**30:.1f} GiB here; " if limit is not None else ""
    return f" ({known}fewer --jobs or a smaller data.batch_size need less)"


def _is_full(log: Path) -> bool:
    try:
        return shutil.disk_usage(log.parent).free < _FULL
    except OSError:
        return False


def last_line(log: Path, limit: int = 300) -> str:
    """The last line that the last process wrote to a log, shortened to ``limit`` characters; empty without one."""
    try:
        with log.open("rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - 8192))
            text = handle.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    # What stands before the last heading was written by an earlier attempt.
    lines: list[str] = []
    for line in text.splitlines():
        lines = [] if line.startswith("=== ") else [*lines, line.strip()]
    said = [line for line in lines if line]
    return said[-1][:limit] if said else ""
