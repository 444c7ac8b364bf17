"""Preparations: what cells share is made once, and only those that need it wait for it or fail with it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from flowbench.bench.causes import explain, was_killed
from flowbench.bench.plan import Cell, Plan
from flowbench.bench.process import start_process
from flowbench.core.preparation_progress import PROGRESS_FILE
from flowbench.core.storage import read_record

__all__ = ["Failure", "Preparations"]


@dataclass(frozen=True)
class Failure:
    """Why a preparation failed.

    Attributes:
        message: one line.
        code: exit status; negative: the signal that ended it.
        log: its log.
    """

    message: str
    code: int
    log: Path


class Preparations:
    """Trains and fetches what cells share: data, feature networks, required experiments.

    Args:
        plan: whose cells.
        program: command line that a subcommand is appended to.
        say: receives one line for every event.

    Attributes:
        ended: values of ``Cell.preparation`` that have been prepared for, or cannot be.
        failures: why cells cannot run, by directory.
        process: the process that prepares at the moment, if one does.
        progress: what it does and how far it is: label -> progress.
    """

    def __init__(self, plan: Plan, program: Sequence[str], say: Callable[[str], None]) -> None:
        self._plan, self._program, self._say = plan, tuple(program), say
        self.ended: set[str] = set()
        self.failures: dict[Path, Failure] = {}
        self.process: Popen[bytes] | None = None
        self.progress: Mapping[str, Mapping[str, Any]] = {}

    def steps(self, cells: Iterable[Cell]) -> Iterator[None]:
        """Prepare for cells, one process after the other; yields while one runs.

        Whoever requires no training comes first: its cells can run while others are prepared for.
        """
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.preparation:
                groups.setdefault(cell.preparation, []).append(cell)
        ordered = sorted(groups.items(), key=lambda item: self._requires_training(item[1][0]))
        for number, (name, group) in enumerate(ordered, start=1):
            yield from self._group(group, f"{number}/{len(ordered)}")
            self.ended.add(name)

    def _requires_training(self, cell: Cell) -> bool:
        return bool(self._plan.experiments[cell.problem, cell.contender].get("requires"))

    def _group(self, cells: Sequence[Cell], place: str) -> Iterator[None]:
        """Prepare for cells with the same data, evaluator and prerequisites: one of their contenders is enough."""
        first = {(cell.problem, cell.contender): cell for cell in reversed(cells)}
        for cell in sorted(first.values(), key=cells.index):
            self._say(f"preparing {place}: data, feature network, prerequisites of {cell.label}")
            failure = yield from self._prepare(cell)
            if failure is None:
                break
            # Whatever was killed is what they share; an error may lie in this contender's file alone.
            shared = was_killed(failure.code)
            mine = [c for c in cells if shared or (c.problem, c.contender) == (cell.problem, cell.contender)]
            self.failures |= {c.directory: failure for c in mine if c.directory not in self.failures}
            self._say(f"preparation failed: {failure.message} (log: {failure.log})")
            if shared:
                break

    def _prepare(self, cell: Cell) -> Generator[None, None, Failure | None]:
        """Prepare for one cell; what was killed is tried once more."""
        log = self._plan.directory / "prepare" / f"{'-'.join(filter(None, (cell.problem, cell.contender)))}.log"
        code = yield from self._attempt(cell, log)
        if was_killed(code):
            self._say(f"preparation {explain(code, log)}; it is tried once more")
            code = yield from self._attempt(cell, log)
        return None if code == 0 else Failure(explain(code, log), code, log)

    def _attempt(self, cell: Cell, log: Path) -> Generator[None, None, int]:
        label = f"prepare {cell.label}"
        progress = log.with_suffix(".progress.json")
        progress.unlink(missing_ok=True)
        environment = {**self._plan.policy.environment, PROGRESS_FILE: str(progress)}
        arguments = [*self._program, "prepare", "-c", str(cell.config_path)]
        self.process = start_process(arguments, log, environment, label)
        while (code := self.process.poll()) is None:
            self.progress = {label: {**read_record(progress), "phase": "preparing"}}
            yield
        self.process, self.progress = None, {}
        return code
