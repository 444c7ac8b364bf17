"""Processes beside this one: children that do not outlive their parent, and how they ended."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["die_with_parent", "end_child", "exit_status", "how_it_ended", "run_child", "takes_orphans"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
# What a child has to save its state in after SIGTERM, before SIGKILL.
_GRACE_SECONDS = 10.0

# What a signal of the kernel is about.
_CAUSES = {
    "SIGKILL": "perhaps for want of memory",
    "SIGXCPU": "the limit of processor time (ulimit -t)",
    "SIGXFSZ": "the limit of the size of a file (ulimit -f)",
    "SIGBUS": "often a full disk or /dev/shm under a file in memory",
}


def how_it_ended(code: int) -> str:
    """The end of a process in words.

    Args:
        code: as ``Popen.returncode`` has it: negative for a signal.
    """
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"ended with exit status {code}"
    cause = _CAUSES.get(name)
    return f"was ended by {name}, {cause}" if cause else f"was ended by {name}"


def exit_status(code: int) -> int:
    """The exit status that stands for a ``Popen.returncode``, as shells write it: 128 + the signal's number."""
    return 128 - code if code < 0 else code


def run_child(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command to its end, its output at the end of a log; it dies with this process.

    An exception in this process, a signal's above all, is passed on: the child may save its state.

    Args:
        command: the command line.
        log: file that the output is appended to.
        environment: the child's whole environment.

    Returns:
        Its return code.
    """
    with log.open("ab") as handle:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # Without the hook it would outlive a killed bench, and hold its folder against the next one.
            preexec_fn=die_with_parent(),
        )
        try:
            return process.wait()
        except BaseException:
            end_child(process)
            raise


def end_child(process: subprocess.Popen[bytes], grace_seconds: float = _GRACE_SECONDS) -> None:
    """End a child: SIGTERM, and SIGKILL if it still lives after the grace period."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def die_with_parent(parent: int | None = None) -> Callable[[], None] | None:
    """A ``preexec_fn`` that makes Linux kill the child when the thread that starts it ends, even by SIGKILL.

    Args:
        parent: number of the process that will be the child's parent; None for this one.

    Returns:
        The hook; None on other systems.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = parent or os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died between fork and prctl
            os._exit(1)

    return ask


@contextmanager
def takes_orphans() -> Iterator[bool]:
    """Within the context, descendants of this process whose parent ends become its children.

    Yields:
        Whether the system does that: Linux does.
    """
    if not sys.platform.startswith("linux"):
        yield False
        return
    libc, before = ctypes.CDLL(None, use_errno=True), ctypes.c_int()
    known = libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) == 0
    try:
        yield known and libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    finally:
        if known:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
