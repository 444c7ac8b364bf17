"""Time that the remaining cells will take, estimated from those that have ended and those that run."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowbench.bench.plan import Cell

__all__ = ["Forecast", "Underway"]

_LEAST_SHARE = 0.2
"""Of a cell: the share that must be done before its own pace is used for the forecast."""


@dataclass(frozen=True)
class Underway:
    """A cell that runs: for how many seconds, and which share of it is done."""

    cell: Cell
    seconds: float
    share: float


class Forecast:
    """Estimates the time that a bench still takes.

    A cell is expected to take as long as those of the same contender that have ended (their median). Where none has
    ended, the pace of one that runs counts, and else the mean over the other contenders, without the reference rows,
    which take no training. The rest of a preparation is not counted.

    Args:
        jobs: how many cells run at once.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._ended: dict[tuple[str, str, str], list[float]] = {}

    def add(self, cell: Cell, seconds: float) -> None:
        """Take note of a cell that has ended after so many seconds."""
        self._ended.setdefault(_kind(cell), []).append(seconds)

    def seconds_left(self, waiting: Iterable[Cell], running: Iterable[Underway]) -> float | None:
        """Seconds until the last cell ends; None while nothing is known of one of them.

        Args:
            waiting: cells in the order in which they will start.
            running: cells that have started.
        """
        running = list(running)
        known = self._known()
        for one in running:
            if one.share >= _LEAST_SHARE:
                known.setdefault(_kind(one.cell), one.seconds / one.share)
        try:
            free = [_rest(one, _expected(one.cell, known)) for one in running]
            durations = [_expected(cell, known) for cell in waiting]
        except statistics.StatisticsError:  # the mean of nothing
            return None
        free += [0.0] * (self._jobs - len(free))
        heapq.heapify(free)
        for seconds in durations:
            heapq.heapreplace(free, free[0] + seconds)
        return max(free)

    def longest_of_seed(self, cells: Sequence[Cell]) -> Cell:
        """The cell to start next: the longest with the least seed of the first problem.

        All contenders are compared at one seed before the next one begins, and with the short cells last the least
        time is spent with nothing left to run beside a long one. Contenders of which nothing is known come first, in
        the order of the plan.

        Args:
            cells: those that can start, in the order of the plan; at least one.
        """
        known = self._known()
        same = [cell for cell in cells if cell.problem == cells[0].problem]
        return min(same, key=lambda cell: (cell.seed, -known.get(_kind(cell), math.inf)))

    def _known(self) -> dict[tuple[str, str, str], float]:
        """Seconds that ended cells took, by kind."""
        return {kind: statistics.median(seconds) for kind, seconds in self._ended.items()}


def _expected(cell: Cell, known: Mapping[tuple[str, str, str], float]) -> float:
    if _kind(cell) in known:
        return known[_kind(cell)]
    return statistics.fmean(seconds for (subcommand, *_), seconds in known.items() if subcommand == cell.kind)


def _rest(one: Underway, expected: float) -> float:
    """Seconds left for a running cell; past its expected time, they follow from the share that is done."""
    return expected - one.seconds if one.seconds < expected else expected * (1 - one.share)


def _kind(cell: Cell) -> tuple[str, str, str]:
    """Cells that differ in their seed alone take about equally long."""
    return cell.kind, cell.problem, cell.contender
