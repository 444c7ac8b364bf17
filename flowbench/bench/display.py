"""The display while cells run: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from flowbench.core.terminal import duration

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "make_display", "share_of_cell"]

TRAINING = 0.75
"""Share of a cell that its training is taken for, in the bar of all cells."""
_WIDE = 100  # columns of a terminal from which on there is room for bars
_BAR = 24


class Display(Protocol):
    """Shows lines and the progress of running cells."""

    def say(self, line: str) -> None:
        """Print one line that stays."""

    def update(
        self, running: Mapping[str, Mapping[str, Any]], done: int, total: int, seconds_left: float | None = None
    ) -> None:
        """Show the running cells (label -> progress.json), how many are finished and how long the others will take."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_display(console: Console, interval: float = 30.0) -> Display:
    """Live bars on a terminal, else a line per event and one every ``interval`` seconds."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console, interval)


class PlainDisplay:
    """Plain lines, for logs and CI."""

    def __init__(self, console: Console, interval: float) -> None:
        self.console = console
        self.interval = interval
        self.last = time.monotonic()

    def say(self, line: str) -> None:
        """Print one line with the time of day."""
        self.console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, markup=False, soft_wrap=True)

    def update(
        self, running: Mapping[str, Mapping[str, Any]], done: int, total: int, seconds_left: float | None = None
    ) -> None:
        """Every ``interval`` seconds, one line that names the running cells."""
        if running and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            parts = [f"{label} {_summary(progress)}" for label, progress in running.items()]
            self.say(f"{done}/{total} finished{_left(seconds_left)}; running: {'; '.join(parts)}")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class LiveDisplay:
    """Rich progress bars: one for the bench and one per running cell, cut to the width of the terminal."""

    def __init__(self, console: Console) -> None:
        # Whatever a person or a library wrote is text, not markup.
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=_column(ratio=3)),
            *([BarColumn(bar_width=_BAR)] if console.width >= _WIDE else []),
            TextColumn("{task.percentage:>3.0f}%", markup=False, table_column=_column(min_width=4)),
            TextColumn("{task.fields[detail]}", markup=False, table_column=_column(ratio=4)),
            TimeElapsedColumn(table_column=_column(min_width=7)),
            console=console,
            transient=True,
            expand=True,
        )
        fixed = 4 + 7 + 3 + (_BAR + 1 if console.width >= _WIDE else 0)  # share, time, gaps, bar
        self._longest = max(10, (console.width - fixed) * 3 // 7)
        self.overall = self.progress.add_task("all cells", total=1.0, detail="")
        self.bars: dict[str, TaskID] = {}

    def say(self, line: str) -> None:
        """Print one line above the bars."""
        self.progress.console.print(line, highlight=False, markup=False)

    def update(
        self, running: Mapping[str, Mapping[str, Any]], done: int, total: int, seconds_left: float | None = None
    ) -> None:
        """Move the bars."""
        for label in [label for label in self.bars if label not in running]:
            self.progress.remove_task(self.bars.pop(label))
        parts = done + sum(share_of_cell(progress) for progress in running.values())
        detail = f"{done}/{total}{_left(seconds_left)}"
        self.progress.update(self.overall, total=max(1, total), completed=parts, detail=detail)
        for label, progress in running.items():
            if label not in self.bars:
                self.bars[label] = self.progress.add_task(_shortened(label, self._longest), total=1.0, detail="")
            self.progress.update(self.bars[label], completed=_fraction(progress), detail=_detail(progress))

    def __enter__(self) -> LiveDisplay:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _shortened(label: str, longest: int) -> str:
    """A label without its middle: cells differ in the end of theirs, by the seed."""
    end = max(8, longest // 2)
    return label if len(label) <= longest else f"{label[: longest - end - 1]}…{label[-end:]}"


def _column(ratio: int | None = None, min_width: int | None = None) -> Column:
    """A column that is cut rather than wrapped."""
    return Column(no_wrap=True, overflow="ellipsis", ratio=ratio, min_width=min_width)


def _fraction(progress: Mapping[str, Any]) -> float:
    """Progress of a cell in its phase."""
    value = progress.get("fraction")
    return min(1.0, max(0.0, float(value))) if isinstance(value, (int, float)) else 0.0


def _left(seconds: float | None) -> str:
    """The time left in words, in whole minutes, from a comma on; empty where it is not known."""
    if seconds is None:
        return ""
    return f", about {duration(60 * max(1, round(seconds / 60)))} left"


def share_of_cell(progress: Mapping[str, Any]) -> float:
    """Share of a whole cell that is done, in [0, 1]; training counts before measuring, so that it never decreases."""
    phase, fraction = progress.get("phase"), _fraction(progress)
    if phase == "fit":
        return TRAINING * fraction
    if phase == "test":
        return TRAINING + (1 - TRAINING) * fraction
    if phase == "reference":  # without training
        return fraction
    return 1.0 if phase == "done" else 0.0


def _detail(progress: Mapping[str, Any]) -> str:
    phase = str(progress.get("phase") or "starting")
    if phase == "fit":
        step = f" step {progress['step']}" if isinstance(progress.get("step"), int) else ""
        loss = f" loss {progress['loss']:.4g}" if isinstance(progress.get("loss"), (int, float)) else ""
        return f"{phase}{step}{loss}"
    return f"{phase}: {progress['what']}" if progress.get("what") else phase


def _summary(progress: Mapping[str, Any]) -> str:
    return f"{_detail(progress)} ({_fraction(progress):.0%})"
