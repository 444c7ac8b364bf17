"""Preparations: what cells share is made once before they run, and only those that need it fail with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from flowbench.bench.causes import explain, was_killed
from flowbench.bench.plan import Cell, Plan
from flowbench.bench.process import start_process
from flowbench.core.progress import PROGRESS_FILE
from flowbench.storage import read_record

__all__ = ["Failure", "Preparations"]

_POLL_SECONDS = 0.1


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
        say: is told what happens, one line each.
        show: is given what runs and how far it is: label -> progress.
    """

    def __init__(
        self,
        plan: Plan,
        program: Sequence[str],
        say: Callable[[str], None],
        show: Callable[[Mapping[str, Mapping[str, Any]]], None],
    ) -> None:
        self._plan, self._program, self._say, self._show = plan, tuple(program), say, show
        self.process: Popen[bytes] | None = None

    def run(self, cells: Iterable[Cell]) -> dict[Path, Failure]:
        """Prepare for cells.

        Returns:
            Why cells cannot run, by directory.
        """
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.preparation:
                groups.setdefault(cell.preparation, []).append(cell)
        failed: dict[Path, Failure] = {}
        for number, group in enumerate(groups.values(), start=1):
            failed |= self._group(group, f"{number}/{len(groups)}")
        return failed

    def _group(self, cells: Sequence[Cell], place: str) -> dict[Path, Failure]:
        """Prepare for cells with the same data, evaluator and prerequisites: one of their contenders is enough."""
        first = {(cell.task, cell.contender): cell for cell in reversed(cells)}
        failed: dict[Path, Failure] = {}
        for cell in sorted(first.values(), key=cells.index):
            self._say(f"preparing {place}: data, feature network, prerequisites of {cell.label}")
            failure = self._prepare(cell)
            if failure is None:
                break
            # Whatever was killed is what they share; an error may lie in this contender's file alone.
            shared = was_killed(failure.code)
            mine = [c for c in cells if shared or (c.task, c.contender) == (cell.task, cell.contender)]
            failed |= {c.directory: failure for c in mine if c.directory not in failed}
            self._say(f"preparation failed: {failure.message} (log: {failure.log})")
            if shared:
                break
        return failed

    def _prepare(self, cell: Cell) -> Failure | None:
        """Prepare for one cell; what was killed is tried once more."""
        log = self._plan.directory / "prepare" / f"{'-'.join(filter(None, (cell.task, cell.contender)))}.log"
        code = self._attempt(cell, log)
        if was_killed(code):
            self._say(f"preparation {explain(code, log)}; it is tried once more")
            code = self._attempt(cell, log)
        return None if code == 0 else Failure(explain(code, log), code, log)

    def _attempt(self, cell: Cell, log: Path) -> int:
        label = f"prepare {cell.label}"
        progress = log.with_suffix(".progress.json")
        progress.unlink(missing_ok=True)
        environment = {**self._plan.policy.environment, PROGRESS_FILE: str(progress)}
        arguments = [*self._program, "prepare", "-c", str(cell.config_path)]
        self.process = start_process(arguments, log, environment, label)
        while (code := self.process.poll()) is None:
            self._show({label: {**read_record(progress), "phase": "preparing"}})
            time.sleep(_POLL_SECONDS)
        self.process = None
        return code
