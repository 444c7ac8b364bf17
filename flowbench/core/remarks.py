"""Lines for the reader of a terminal, beside what a command prints as its result."""

from __future__ import annotations

import sys
from functools import cache

__all__ = ["say_once"]


@cache
def say_once(line: str) -> None:
    """Print a line to stderr, once in a run: on the first process, however often it is called."""
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only(print)(line, file=sys.stderr, flush=True)
