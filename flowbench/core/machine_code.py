"""Numerical loops compiled to machine code by Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from numba import njit

__all__ = ["numba_njit"]

P = ParamSpec("P")
R = TypeVar("R")


def numba_njit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function at its first call, and keep the code on disk for later processes.

    The code is kept beside the source or, where that is read-only, in the user's cache (``NUMBA_CACHE_DIR`` names
    another place); without any such folder each process compiles anew, a few seconds. A folder that is full stops the
    run, as it does anywhere else. While the code runs, other threads can.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to write to
        return njit(nogil=True)(function)
