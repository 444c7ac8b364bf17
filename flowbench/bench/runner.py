"""Runs the cells of a plan as processes; the same plan again continues where the last run stopped."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from flowbench.bench.causes import explain, last_line, was_killed
from flowbench.bench.display import Display, share_of_cell
from flowbench.bench.forecast import Forecast, Underway
from flowbench.bench.kept import adopt, check_rows, rename
from flowbench.bench.plan import Cell, Plan
from flowbench.bench.preparation import Preparations
from flowbench.bench.process import Process, Start, stop_processes
from flowbench.bench.results import collect
from flowbench.bench.status import Status, lock_is_held, read_progress, read_status, write_status
from flowbench.core.statuses import PARTLY_MEASURED
from flowbench.core.storage import write_text

__all__ = ["Interrupted", "Runner"]

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""The checkpoint of a training cell, relative to its directory."""

_POLL_SECONDS = 0.1


class Interrupted(BaseException):
    """A signal ended the bench."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class _Attempt:
    """A running cell; ``process`` is None for a cell that an earlier bench started and that still lives."""

    cell: Cell
    process: Process | None
    started: float


class Runner:
    """Prepares and runs the cells of a plan, with up to ``plan.policy.jobs`` at a time.

    Everything happens in the calling thread: on Linux a child's death signal is bound to the thread that
    started it.

    Args:
        plan: what to run.
        display: where progress is shown.
        start: starts a process of the program that prepares and runs cells.
    """

    def __init__(self, plan: Plan, display: Display, start: Start) -> None:
        self.plan = plan
        self.display = display
        self.start = start
        self.running: dict[Path, _Attempt] = {}
        self.again: set[Path] = set()
        self.finished = 0
        self.forecast = Forecast(plan.policy.jobs)
        self.preparations = Preparations(plan, start, display.say)

    def run(self) -> bool:
        """Run what is not finished; True when every cell is DONE.

        Raises:
            Interrupted: after SIGINT or SIGTERM; all children have ended by then.
            ValueError: when the program does not exist.
            OSError: when the bench's own files cannot be written.
        """
        everything = self.plan.everything
        with _signals():
            try:
                adopt(self.plan, self.display.say)
                todo = deque(cell for cell in everything if not self._settle(cell))
                for cell in everything:
                    self._note_duration(cell)
                self.finished = len(everything) - len(todo)
                if self.finished:
                    self.display.say(f"{self.finished} of {len(everything)} finished before; they are kept")
                self._run_pool(todo)
            except BaseException:
                self._stop()
                raise
        return all(read_status(c.directory).is_done(c.config_hash) for c in everything)

    def _settle(self, cell: Cell) -> bool:
        """Make the cell's directory fit the plan; True when the cell is finished."""
        status = read_status(cell.directory)
        held = lock_is_held(cell.directory)
        if status.is_done(cell.config_hash) and self._has_rows(cell):
            rename(cell)
            return True
        if status.state == "RUNNING" and not held and self._ended_well(cell, status):
            self._mark(cell, replace(status, state="DONE", exit_code=0))
            return True
        if not held:
            cell.directory.mkdir(parents=True, exist_ok=True)
            write_text(cell.config_path, cell.config_text())
        return False

    def _has_rows(self, cell: Cell) -> bool:
        """Whether a DONE cell still has its rows; one whose files were damaged or deleted is run again."""
        try:
            check_rows(cell, cell.directory, self.plan.bench.name)
        except ValueError as error:
            self.display.say(f"{cell.label}: {error}; it is run again")
            return False
        return True

    def _ended_well(self, cell: Cell, status: Status) -> bool:
        """Whether a cell whose bench died finished on its own: done, with rows younger than its start."""
        rows = cell.directory / "rows.jsonl"
        if read_progress(cell.directory).get("phase") != "done" or not rows.is_file():
            return False
        if rows.stat().st_mtime < (status.started or 0.0):
            return False
        try:
            check_rows(cell, cell.directory, self.plan.bench.name)
        except ValueError:
            return False
        return True

    def _drop_unprepared(self, todo: deque[Cell]) -> None:
        """Cells without their prerequisites fail."""
        for cell in list(todo):
            if (failure := self.preparations.failures.get(cell.directory)) is not None:
                todo.remove(cell)
                self._fail(cell, f"preparation: {failure.message}", failure.code, str(failure.log))

    def _fail(self, cell: Cell, message: str, code: int | None = None, log: str = "log.txt") -> None:
        """A cell that cannot start."""
        status = read_status(cell.directory)
        self._mark(cell, replace(status, state="FAILED", exit_code=code, message=message, log=log))
        self.finished += 1

    @property
    def _total(self) -> int:
        return len(self.plan.everything)

    def _show(self, waiting: Sequence[Cell]) -> None:
        """Update the display: the preparation, each running cell, and the seconds left for all."""
        progress = {a.cell.directory: read_progress(a.cell.directory) for a in self.running.values()}
        underway = [
            Underway(a.cell, time.time() - a.started, share_of_cell(progress[a.cell.directory]))
            for a in self.running.values()
        ]
        left = self.forecast.seconds_left(waiting, underway)
        cells = {a.cell.label: progress[a.cell.directory] for a in self.running.values()}
        self.display.update({**self.preparations.progress, **cells}, self.finished, self._total, left)

    def _note_duration(self, cell: Cell) -> None:
        """Seconds that a finished cell took; one that was interrupted took longer than its last attempt."""
        status = read_status(cell.directory)
        if status.is_done(cell.config_hash) and status.wall_seconds is not None and status.attempts == 1:
            self.forecast.add(cell, status.wall_seconds)

    def _run_pool(self, todo: deque[Cell]) -> None:
        """Run cells side by side; a preparation takes the place of one, and what it does not concern goes on."""
        self.preparations.add(todo)
        while self.preparations.advance(self.plan.policy.jobs - len(self.running)) or todo or self.running:
            self._drop_unprepared(todo)
            while self._busy < self.plan.policy.jobs and (cell := self._next(todo)) is not None:
                self._start(cell)
            for attempt in list(self.running.values()):
                if self._poll(attempt, todo):
                    collect(self.plan.directory)
            self._show(todo)
            if self._busy:
                time.sleep(_POLL_SECONDS)

    @property
    def _busy(self) -> int:
        return len(self.running) + self.preparations.places

    def _next(self, todo: deque[Cell]) -> Cell | None:
        """Take a cell that can start; those whose weights' training failed fail with it."""
        while ready := self._ready(todo):
            cell = self.forecast.longest_of_seed(ready)
            todo.remove(cell)
            if cell.trained is None or read_status(cell.trained).state == "DONE":
                return cell
            self._fail(cell, f"its weights are missing: {cell.trained} did not finish")
            self.display.say(f"FAILED {cell.label}: its weights are missing")
        return None

    def _ready(self, todo: Sequence[Cell]) -> list[Cell]:
        """Cells that are prepared and whose weights are not in training at the moment.

        One that was killed before runs alone: others beside it may have taken the memory.
        """
        if self.again & self.running.keys():
            return []
        waiting = {cell.directory for cell in todo} | self.running.keys()
        return [
            cell
            for cell in todo
            if cell.trained not in waiting
            and not (cell.directory in self.again and self._busy)
            and self.preparations.is_prepared(cell)
        ]

    def _start(self, cell: Cell) -> None:
        if lock_is_held(cell.directory):
            self.display.say(f"{cell.label}: a process from an earlier run is still at work; waiting for it")
            started = read_status(cell.directory).started or 0.0
            self.running[cell.directory] = _Attempt(cell, None, started)
            return
        status = read_status(cell.directory)
        started, attempts = time.time(), status.attempts + 1
        policy = self.plan.policy
        self._mark(
            cell,
            Status(
                "RUNNING",
                attempts=attempts,
                started=started,
                jobs=policy.jobs,
                threads=policy.threads,
                names=[self.plan.bench.name, cell.problem, cell.contender],
            ),
        )
        words = [cell.kind, "-c", str(cell.config_path)]
        if cell.kind == "fit":
            words.append("--test")
        elif cell.trained is not None:
            words += ["--ckpt", str(cell.trained / CHECKPOINT)]
        process = self.start(words, cell.directory / "log.txt", policy.environment, f"{cell.label}, attempt {attempts}")
        self.running[cell.directory] = _Attempt(cell, process, started)
        again = "" if attempts == 1 else f" (attempt {attempts})"
        self.display.say(f"start {cell.label}{again}")

    def _poll(self, attempt: _Attempt, todo: deque[Cell]) -> bool:
        """Whether the attempt has ended; its status is written then, and what was killed is tried once more."""
        if attempt.process is None:
            return self._poll_adopted(attempt)
        code = attempt.process.poll()
        if code is None:
            return False
        del self.running[attempt.cell.directory]
        self._finish(attempt, code)
        if was_killed(code) and attempt.cell.directory not in self.again:
            self.again.add(attempt.cell.directory)
            self.finished -= 1
            todo.append(attempt.cell)
            self.display.say(f"{attempt.cell.label} is tried once more, alone; it goes on from its checkpoint")
        return True

    def _poll_adopted(self, attempt: _Attempt) -> bool:
        cell = attempt.cell
        if lock_is_held(cell.directory):
            return False
        del self.running[cell.directory]
        if self._ended_well(cell, read_status(cell.directory)):
            self._finish(attempt, 0)
            return True
        self._start(cell)
        return False

    def _finish(self, attempt: _Attempt, code: int) -> None:
        cell, seconds = attempt.cell, time.time() - attempt.started
        log = cell.directory / "log.txt"
        measured = code in (0, PARTLY_MEASURED)
        message = "" if measured else explain(code, log)
        if measured:
            try:
                check_rows(cell, cell.directory, self.plan.bench.name)
            except ValueError as error:
                message = str(error)
        state: Any = "FAILED" if message else "DONE"
        status = read_status(cell.directory)
        self._mark(cell, replace(status, state=state, exit_code=code, wall_seconds=seconds, message=message))
        self.finished += 1
        if state == "DONE":
            self._note_duration(cell)
            less = "" if code == 0 else f", {last_line(log).removeprefix('flowbench: ')}"
            self.display.say(f"done  {cell.label} in {seconds:.0f} s{less}")
        else:
            self.display.say(f"FAILED {cell.label} after {seconds:.0f} s: {message} (log: {log})")

    def _mark(self, cell: Cell, status: Status) -> None:
        write_status(cell.directory, replace(status, config_hash=cell.config_hash))

    def _stop(self) -> None:
        """End all children; their cells continue from their checkpoints next time."""
        children = [a.process for a in self.running.values() if a.process is not None]
        stop_processes([*children, *self.preparations.processes])


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`Interrupted`; only the main thread may do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
