"""Computations that find no answer."""

from __future__ import annotations

__all__ = ["NoSolutionError"]


class NoSolutionError(FloatingPointError, RuntimeError):
    """A solver that gave up: it names itself, why, and what to change.

    Not a mistake of the code, so it is reported without a traceback.
    """
