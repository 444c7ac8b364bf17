"""Standard output and error that never decide about a result.

A run is not undone because its last line could not be printed. Characters that the terminal's encoding lacks are
replaced by others that look alike, or written as escapes; a stream that is closed, full or no longer read is dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

__all__ = ["answer", "safe_streams"]

_ERRORS = "flowbench.readable"
_LINES = {"─": "-", "━": "-", "═": "-", "│": "|", "┃": "|", "║": "|"}
_ALIKE = {"±": "+/-", "≤": "<=", "≥": ">=", "↓": "v", "↑": "^", "→": "->", "–": "-", "−": "-", "×": "x", "…": "..."}


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """What to write for characters that an encoding lacks (an error handler of the codecs)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(map(_ascii, missing)), error.end


def _ascii(character: str) -> str:
    box = "\u2500" <= character <= "\u257f"
    known = _LINES.get(character, "+") if box else _ALIKE.get(character)
    return known or character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_ERRORS, _readable)


class _Stream:
    """A text stream that drops what it cannot write; everything else is the stream's own.

    Attributes:
        fault: why writing ended; None while it works.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.fault: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write, or drop, the text."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a stream whose way with other characters cannot be set
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, _ERRORS).decode(encoding))
        except (OSError, ValueError) as error:  # a closed stream raises a ValueError
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        self.fault = self.fault or error
        # What the stream still holds goes nowhere, or the interpreter would fail over it when it ends.
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Make standard output and error safe while a command runs."""
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    streams = tuple(_safe(stream) for stream in before)
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def answer(text: object) -> None:
    """Print what a command is there to print: a table, a configuration.

    Raises:
        OSError: it could not be written, and not because the reader of a pipe had seen enough.
    """
    print(text, flush=True)
    fault = getattr(sys.stdout, "fault", None)
    if fault is not None and getattr(fault, "errno", None) != errno.EPIPE:
        raise OSError(f"standard output could not be written: {getattr(fault, 'strerror', None) or fault}")


def _safe(stream: TextIO | None) -> _Stream:
    if stream is None:  # it was closed before Python started
        stream = open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, _Stream):
        return stream
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=_ERRORS)
    return _Stream(stream)


def _open_standard_descriptors() -> None:
    """Let the descriptors 0 to 2 lead nowhere where they are closed: a file opened later would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
