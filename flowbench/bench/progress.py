"""What the user sees while cells run: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "make_display"]


class Display(Protocol):
    """Shows lines and the progress of running cells."""

    def say(self, line: str) -> None:
        """Print one line that stays."""

    def update(self, running: Mapping[str, Mapping[str, Any]], done: int, total: int) -> None:
        """Show the running cells (label -> progress.json) and how many are finished."""

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

    def update(self, running: Mapping[str, Mapping[str, Any]], done: int, total: int) -> None:
        """Every ``interval`` seconds, one line that names the running cells."""
        if running and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            parts = [f"{label} {_summary(progress)}" for label, progress in running.items()]
            self.say(f"{done}/{total} finished; running: {'; '.join(parts)}")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class LiveDisplay:
    """Rich progress bars: one for the bench and one per running cell."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.overall = self.progress.add_task("[bold]all cells", total=1.0, detail="")
        self.bars: dict[str, TaskID] = {}

    def say(self, line: str) -> None:
        """Print one line above the bars."""
        self.progress.console.print(line, highlight=False, markup=False)

    def update(self, running: Mapping[str, Mapping[str, Any]], done: int, total: int) -> None:
        """Move the bars."""
        for label in [label for label in self.bars if label not in running]:
            self.progress.remove_task(self.bars.pop(label))
        parts = done + sum(_fraction(progress) for progress in running.values())
        self.progress.update(self.overall, total=max(1, total), completed=parts, detail=f"{done}/{total}")
        for label, progress in running.items():
            if label not in self.bars:
                self.bars[label] = self.progress.add_task(label, total=1.0, detail="")
            self.progress.update(self.bars[label], completed=_fraction(progress), detail=_detail(progress))

    def __enter__(self) -> LiveDisplay:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _fraction(progress: Mapping[str, Any]) -> float:
    value = progress.get("fraction")
    return min(1.0, max(0.0, float(value))) if isinstance(value, (int, float)) else 0.0


def _detail(progress: Mapping[str, Any]) -> str:
    parts = [str(progress.get("phase") or "starting")]
    if progress.get("phase") == "fit":
        if isinstance(progress.get("step"), int):
            parts.append(f"step {progress['step']}")
        if isinstance(progress.get("loss"), (int, float)):
            parts.append(f"loss {progress['loss']:.4g}")
    return " ".join(parts)


def _summary(progress: Mapping[str, Any]) -> str:
    return f"{_detail(progress)} ({_fraction(progress):.0%})"
