"""Where a measurement stands among its parts, as one fraction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

__all__ = ["Report", "Stages", "Steps", "silent", "uncounted"]

Report = Callable[[str, float], None]
"""Is told what is being done, and which share of everything is done."""
Steps = Callable[[int, int], None]
"""Is told how many steps of how many are done."""


def silent(what: str, fraction: float) -> None:
    """A report that nobody reads."""


def uncounted(done: int, total: int) -> None:
    """Steps that nobody counts."""


class Stages:
    """The parts of a measurement, which count alike.

    Args:
        names: the parts in their order.
        report: is told of every step.
    """

    def __init__(self, names: Sequence[str] = (), report: Report = silent) -> None:
        self._names, self._report = list(names), report

    def __call__(self, name: str, done: int = 0, total: int = 1, detail: str = "") -> None:
        """Report that `done` of the `total` steps of a part are done, and what the next one is."""
        share = done / total if total else 0.0
        text = " ".join(filter(None, (name, detail, f"{done}/{total}" if total > 1 else "")))
        self._report(text, (self._names.index(name) + share) / len(self._names))

    def of(self, name: str) -> Steps:
        """The steps of one part; those of a part that is not in the list are not counted."""
        return partial(self, name) if name in self._names else uncounted

    def counter(self, name: str, total: int) -> Callable[[str], None]:
        """Steps of one part that are reported as each begins, by what it is."""
        numbers = itertools.count()

        def begin(detail: str) -> None:
            if name in self._names:
                self(name, next(numbers), total, detail)

        return begin
