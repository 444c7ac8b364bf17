"""Signals that end a command become an exception: at once, or at the next point where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from flowbench.core.launch import started_by_srun

__all__ = ["LISTENER", "Listener", "Stopped", "reason_of_exit", "stops_on_signals"]

Handler = Callable[[int, FrameType | None], object] | int | None

# A terminal, a person, a scheduler: all end a process by one of these. SIGUSR1 and SIGUSR2 are the warnings of
# batch systems, SIGXCPU that of a limit on processor time.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
# Under SLURM, Lightning has a use of its own for these: it puts the job into the queue again.
_SCHEDULERS = ("SIGUSR1", "SIGUSR2")


class Stopped(BaseException):
    """A signal ended the process.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)

    def __str__(self) -> str:
        return "interrupted" if self.number == signal.SIGINT else f"ended by {self.number.name}"

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended, 128 + number."""
        return 128 + self.number


def reason_of_exit(exit: SystemExit) -> BaseException:
    """Signals that Lightning turned into an exit: an interrupt into ``exit(1)``, SIGTERM into an exit without a status.

    Returns:
        KeyboardInterrupt or :class:`Stopped`; the exit itself where it is nothing of the kind.
    """
    if isinstance(exit.__context__, KeyboardInterrupt):
        return exit.__context__
    return Stopped(signal.SIGTERM) if type(exit).__name__ == "SIGTERMException" else exit


class Listener:
    """Receives the signals; there is one of it, because handlers belong to the process.

    Attributes:
        deferring: a first signal only sets `pending`, because a better moment is near; a second one ends at once.
        pending: the signal that waits for that moment.
    """

    def __init__(self) -> None:
        self.deferring = False
        self.pending: int | None = None
        self._replaced: dict[int, Handler] = {}

    @property
    def is_listening(self) -> bool:
        """Whether the handlers are in place."""
        return bool(self._replaced)

    def start(self) -> None:
        """Replace default handlers; signals that are ignored (``nohup``) or handled already stay so."""
        self.deferring, self.pending = False, None
        for number in _numbers():
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._replaced[number] = handler
        self.take_over()

    def take_over(self) -> None:
        """Put the handlers in place again, after other code replaced them."""
        for number in self._replaced:
            signal.signal(number, self._receive)

    def add(self, number: int) -> Handler:
        """Listen to another signal too, until the end; returns the handler that was in place."""
        self._replaced.setdefault(number, signal.SIG_DFL)
        return signal.signal(number, self._receive)

    def end(self) -> None:
        """Give the default handlers back."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}
        self.deferring, self.pending = False, None

    def raise_pending(self) -> None:
        """End now, if a signal waits.

        Raises:
            Stopped: for that signal.
        """
        self.deferring = False
        if self.pending is not None:
            raise Stopped(self.pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.deferring and self.pending is None:
            self.pending = number
            return
        raise Stopped(number)


LISTENER = Listener()
"""The one of this process."""


@contextmanager
def stops_on_signals() -> Iterator[None]:
    """Within the context the signals that end a process raise :class:`Stopped`; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread() or LISTENER.is_listening:
        yield
        return
    LISTENER.start()
    try:
        yield
    finally:
        LISTENER.end()


def _numbers() -> list[int]:
    names = [name for name in _NAMES if not (name in _SCHEDULERS and started_by_srun())]
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
