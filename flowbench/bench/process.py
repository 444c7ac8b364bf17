"""Starting and ending the processes of a bench, so that none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from flowbench.core.launch import without_launcher
from flowbench.core.processes import die_with_parent

__all__ = ["Process", "Start", "start_process", "stop_processes", "write_heading"]


class Process(Protocol):
    """A running process that leads its own group; ``subprocess.Popen`` is one."""

    @property
    def pid(self) -> int:
        """Its number, and that of its group."""

    def poll(self) -> int | None:
        """Its return code as ``Popen.returncode`` has it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the return code.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """


Start = Callable[[Sequence[str], Path, Mapping[str, str], str], Process]
"""Starts a process of the bench's program: subcommand and options, log, additional environment, title in the log."""


def start_process(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], title: str
) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to the end of a log file.

    The process leads its own group (so that a Ctrl-C reaches it through the bench, once) and, on Linux, is
    killed by the kernel when the bench dies, even by SIGKILL.

    Args:
        arguments: the command line.
        log: file the output is appended to.
        environment: added to this process's environment, of which a launcher's variables are left out.
        title: heading written to the log.

    Raises:
        ValueError: when the program does not exist.
        OSError: when the log cannot be written, e.g. on a full disk.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as handle:
        write_heading(handle, title, arguments)
        try:
            return subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env={**without_launcher(os.environ), **environment},
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except FileNotFoundError:
            raise ValueError(f"{arguments[0]} does not exist; install flowbench in this environment") from None


def write_heading(handle: IO[bytes], title: str, arguments: Sequence[str]) -> None:
    """Write to a log what is started; what stands above belongs to earlier processes."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    handle.write(f"=== {title}, {stamp}: {' '.join(arguments)}\n".encode())
    handle.flush()


def stop_processes(processes: Iterable[Process], grace_seconds: float = 10.0) -> None:
    """End processes and their groups: SIGTERM, and SIGKILL for those still alive after the grace period."""
    processes = list(processes)
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: Process, number: signal.Signals) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
