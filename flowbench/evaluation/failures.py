"""What of a measurement could not be computed, and why: it costs its own rows and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from flowbench.core.distributed import gather_objects, is_initialized

__all__ = ["Failure", "Failures", "PartFailedError", "agreed", "together"]

Answer = TypeVar("Answer")

# What says by itself what is wrong with the numbers; anything else is a mistake of the code.
_NUMERICAL = (ValueError, FloatingPointError, torch.linalg.LinAlgError, torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    Attributes:
        reason: one line for the rows.
        bug: the exception, where it is a mistake of the code and must be seen; None for a computation that has no
            answer.
    """

    reason: str
    bug: Exception | None = None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure of an exception."""
        text = " ".join(str(error).split())
        if isinstance(error, _NUMERICAL):
            return cls(text or type(error).__name__)
        return cls(f"{type(error).__name__}: {text}", error)


class PartFailedError(RuntimeError):
    """A part of a measurement failed, here or on another process."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


@contextmanager
def agreed() -> Iterator[None]:
    """The work of each process before a collective: where it fails on one, it fails on all, and nobody waits.

    Raises:
        PartFailedError: on all processes, with this one's failure or that of the first other one.
    """
    failure: Failure | None = None
    try:
        yield
    except PartFailedError as error:
        failure = error.failure
    except Exception as error:
        failure = Failure.of(error)
    elsewhere = _first_of_all(failure)
    found = failure or elsewhere
    if found is not None:
        raise PartFailedError(found) from found.bug


@contextmanager
def together() -> Iterator[None]:
    """What may end a measurement on one process ends it on all, instead of leaving the others to wait; a collective.

    Raises:
        Exception: what was raised inside; on processes where nothing was, :class:`PartFailedError`.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    elsewhere = _first_of_all(None if error is None else Failure.of(error))
    if error is not None:
        raise error
    if elsewhere is not None:
        raise PartFailedError(elsewhere)


def _first_of_all(mine: Failure | None) -> Failure | None:
    """The first failure among all processes; a collective."""
    if not is_initialized():
        return mine
    failures = gather_objects(None if mine is None else (mine.reason, mine.bug is not None))
    for rank, other in enumerate(failures):
        if other is not None:
            reason = f"process {rank}: {other[0]}"
            return Failure(reason, RuntimeError(reason) if other[1] else None)
    return None


class Failures:
    """The failures of one measurement."""

    def __init__(self) -> None:
        self._bug: Exception | None = None

    def ask(self, compute: Callable[[], Answer]) -> Answer | Failure:
        """Compute what all processes take part in, whose own work stands in :func:`agreed`."""
        try:
            return compute()
        except PartFailedError as error:
            return self._noted(error.failure)
        except Exception as error:
            if is_initialized():  # the others may wait in a collective: only the end of the measurement helps
                raise
            return self._noted(Failure.of(error))

    def compute(self, compute: Callable[[], Answer]) -> Answer | Failure:
        """Compute what no other process takes part in."""
        try:
            return compute()
        except Exception as error:
            return self._noted(Failure.of(error))

    def raise_bug(self) -> None:
        """Raise the first mistake of the code, once everything else is written."""
        if self._bug is not None:
            raise self._bug

    def _noted(self, failure: Failure) -> Failure:
        self._bug = self._bug or failure.bug
        return failure
