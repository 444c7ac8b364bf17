"""Starting the processes of a bench: as forks of a server that has imported what they need, or each anew."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from flowbench.bench.process import Process, start_process, write_heading
from flowbench.core.forking import READY, ask
from flowbench.core.launch import without_launcher
from flowbench.core.processes import die_with_parent, takes_orphans

__all__ = ["PROGRAM", "SERVER", "Starter"]

PROGRAM = (sys.executable, "-m", "flowbench.cli")
"""The program that runs a cell; a subcommand and ``-c cell.yaml`` are appended."""

SERVER = (sys.executable, "-m", "flowbench.cli.server")
"""The program that forks what would be processes of ``PROGRAM``; the number of a socket is appended."""


class Starter:
    """Starts processes of a program; within its context they are forked from a server, as long as there is one.

    Args:
        program: command line that a subcommand is appended to.
        server: command line of the server; empty for a new process each time.
        environment: added to the server's environment. What is started has it too: libraries read it when they are
            loaded.

    Attributes:
        is_ready: whether the server has been asked and can fork.
    """

    def __init__(self, program: Sequence[str], server: Sequence[str], environment: Mapping[str, str]) -> None:
        self._program = tuple(program)
        self._server = tuple(server) if sys.platform.startswith("linux") else ()
        self._environment = dict(environment)
        self._stack = ExitStack()
        self._channel: socket.socket | None = None
        self.is_ready = False

    def __enter__(self) -> Starter:
        if self._server:
            self._start_server()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel = None
        self._stack.close()

    def __call__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], title: str) -> Process:
        """Start a process, see :data:`~flowbench.bench.process.Start`."""
        return self._fork(words, log, environment, title) or start_process(
            [*self._program, *words], log, environment, title
        )

    def _start_server(self) -> None:
        """Start the server, which imports while this process goes on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stack.enter_context(ours)
        with theirs:
            if not self._stack.enter_context(takes_orphans()):
                return
            self._output = self._stack.enter_context(tempfile.TemporaryFile())
            try:
                process = subprocess.Popen(
                    [*self._server, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=subprocess.STDOUT,
                    env={**without_launcher(os.environ), **self._environment},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
            except OSError:
                return
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)  # it holds nothing that would have to be saved
        self._channel = ours

    def _fork(self, words: Sequence[str], log: Path, environment: Mapping[str, str], title: str) -> Process | None:
        """A process from the server; None where there is none, or it is of no use."""
        channel = self._channel
        if channel is None:
            return None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as handle:
            if not self._is_served(channel, handle):
                return None
            write_heading(handle, title, [*self._program, *words])
            try:
                number = ask(channel, words, environment, handle.fileno())
            except ConnectionError:
                self._channel = None
                return None
            except EOFError:
                self._channel = None
                # If it runs after all, the next attempt finds its lock held and waits for it.
                return _Forked(0, -signal.SIGKILL)
        return None if number is None else _Forked(number)

    def _is_served(self, channel: socket.socket, log: IO[bytes]) -> bool:
        """Whether the server can be asked, once it has imported everything; else a log has what it wrote."""
        if not self.is_ready:
            with suppress(ConnectionError):
                self.is_ready = channel.recv(len(READY)) == READY
            if not self.is_ready:
                self._channel = None
                self._output.seek(0)
                write_heading(log, "processes cannot be forked", self._server)
                log.write(self._output.read())
        return self.is_ready


class _Forked:
    """A child that another process forked, with what a bench needs of :class:`subprocess.Popen`.

    Args:
        pid: its number.
        code: its return code; None while it runs.
    """

    def __init__(self, pid: int, code: int | None = None) -> None:
        self.pid = pid
        self._code = code

    def poll(self) -> int | None:
        """Its return code, None while it runs."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # it was no child: it saw that and ended
                self._code = -signal.SIGKILL
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its return code, for at most so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(["flowbench"], timeout)
            time.sleep(0.02)
        return code
