"""The end of a command: one line, an exit status, and the details in a log."""

from __future__ import annotations

import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from flowbench.core.launch import process_rank
from flowbench.core.stopping import Stopped

__all__ = [
    "LOG",
    "LOST",
    "ProcessEnded",
    "describe",
    "is_distributed",
    "is_expected",
    "keep_details",
    "note",
    "notes",
    "reason",
    "recorded_error",
]

LOG = "error.log"
"""Name of the file with tracebacks in a run's folder."""

LOST = "the processes of the run lost each other"
"""Begin of the line about an error that another process caused."""

_LONGEST = 400
_CONTINUES = "the same command continues"
_DISTRIBUTED = {"DistNetworkError", "DistStoreError"}
# Gloo's and NCCL's; their messages about a missing backend or wrong arguments are not among these.
_DISTRIBUTED_TEXT = re.compile(
    r"closed by peer|reset by peer|broken pipe|gloo/transport|timed out waiting|socket timeout|operation timeout|"
    r"remote process|monitoredbarrier",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^=== .* process \S+ \(pid (\d+)\): (.*)$", re.M)


class ProcessEnded(RuntimeError):
    """Another process, on which this one depends, ended.

    Attributes:
        status: the exit status that this one should end with.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class _Note(str):
    """A part of the line about an exception, which this package added."""


class _Details(_Note):
    """One line with the path of the traceback."""


def note(error: BaseException, text: str) -> None:
    """Add to the message of an exception where the run stood and where the details are."""
    error.add_note(_Note(text))


def notes(error: BaseException) -> list[str]:
    """What :func:`note` added, in order."""
    return [text for text in getattr(error, "__notes__", ()) if isinstance(text, _Note)]


def is_distributed(error: BaseException) -> bool:
    """Whether a process lost another one, by the messages of PyTorch, Gloo or NCCL."""
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & _DISTRIBUTED) or (
        isinstance(error, RuntimeError) and _DISTRIBUTED_TEXT.search(str(error)) is not None
    )


def is_expected(error: BaseException) -> bool:
    """Whether the message alone is enough for the user: other exceptions need their traceback."""
    known = (OSError, FloatingPointError, ProcessEnded, KeyboardInterrupt, Stopped)
    return _is_mistake(error) or isinstance(error, known)


def _is_mistake(error: BaseException) -> bool:
    """Whether the user can mend it; the other one is Lightning's."""
    return isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException"


def describe(error: BaseException) -> tuple[str, int]:
    """The line about the exception that ended a command, and the exit status.

    Returns:
        One line without the program's name. The status is 2 for the user's mistakes, 128 + number for signals, what
        another process ended with, and 1 for everything else.
    """
    more = notes(error)
    if isinstance(error, KeyboardInterrupt | Stopped):
        stop = error if isinstance(error, Stopped) else Stopped(2)
        return "; ".join([str(stop), *(more or [_CONTINUES])]), stop.status
    said = "; ".join([f"error: {reason(error)}", *more])
    if _is_mistake(error):
        return said, 2
    return said, getattr(error, "status", 1) if is_expected(error) else 1


def reason(error: BaseException) -> str:
    """The message of an error in one line, without the notes added to it."""
    if is_expected(error):
        return _one_line(error)
    kind = LOST if is_distributed(error) else type(error).__name__
    message = _shortened(_one_line(error))
    return f"{kind}: {message}" if message else kind


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4].rstrip()} ..."


def keep_details(error: BaseException, folder: Path | None = None) -> None:
    """Append an exception's traceback to a log, once, and note on the exception where it is.

    Args:
        error: the exception.
        folder: a run's; None takes a folder of the user's own among the temporary files.
    """
    if any(isinstance(text, _Details) for text in notes(error)):
        return
    trace = "".join(traceback.format_exception(error))
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    heading = f"=== {stamp} process {process_rank()} (pid {os.getpid()}): {_shortened(describe(error)[0])}"
    try:
        path = _temporary_log() if folder is None else folder / LOG
        # One write to the end: processes that fail together must not mix their lines.
        with path.open("ab", buffering=0) as file:
            file.write(f"{heading}\n{trace}\n".encode(errors="replace"))
    except OSError as failure:  # of a full disk: it must not hide the exception
        error.add_note(_Details(f"the details cannot be kept ({failure.strerror})"))
    else:
        error.add_note(_Details(f"details in {path}"))


def recorded_error(folder: Path, pid: int) -> str | None:
    """The line about the error that a process wrote to a run's log last; None where it wrote none."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return next((said for found, said in reversed(list(_headings(text))) if found == pid), None)


def _headings(text: str) -> Iterator[tuple[int, str]]:
    return ((int(match[1]), match[2].removeprefix("error: ")) for match in _HEADING.finditer(text))


def _temporary_log() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"flowbench-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
