"""Exit statuses of the command line that other programs look at."""

from __future__ import annotations

__all__ = ["PARTLY_MEASURED"]

PARTLY_MEASURED = 3
"""Everything was done and written, but some numbers could not be computed: their rows hold the reason.

A number that has not converged was computed, and changes no exit status: its row says what it is worth.
"""
