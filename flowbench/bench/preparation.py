"""Preparations: what cells share is made once, and only those that need it wait for it or fail with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.bench.causes import explain, was_killed
from flowbench.bench.plan import Cell, Plan
from flowbench.bench.process import Process, Start
from flowbench.config import fingerprint
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

    Cells with the same data, evaluator and requirements are prepared for together. Such groups are prepared for side by
    side, unless both begin with the same training: one would only wait for the other.

    Args:
        plan: whose cells.
        start: starts a process of the bench's program.
        say: receives one line for every event.

    Attributes:
        ended: values of ``Cell.preparation`` that have been prepared for, or cannot be.
        failures: why cells cannot run, by directory.
    """

    def __init__(self, plan: Plan, start: Start, say: Callable[[str], None]) -> None:
        self._plan, self._start, self._say = plan, start, say
        self._problems: dict[str, set[str]] = {}
        self._waiting: deque[_Group] = deque()
        self._running: list[_Group] = []
        self.ended: set[str] = set()
        self.failures: dict[Path, Failure] = {}

    def add(self, cells: Iterable[Cell]) -> None:
        """Take the cells that are to be prepared for; nothing is started yet."""
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.preparation:
                groups.setdefault(cell.preparation, []).append(cell)
                self._problems.setdefault(cell.problem, set()).add(cell.preparation)
        ordered = _in_order([(self._requirements(group[0]), group) for group in groups.values()])
        for number, (requirements, group) in enumerate(ordered, start=1):
            begins_with = requirements or frozenset({self._data_set(group[0])})
            self._waiting.append(_Group(self, group, f"{number}/{len(ordered)}", begins_with))

    def advance(self, places: int) -> bool:
        """Look after what runs, and start what there is room for.

        Args:
            places: how many groups may be prepared for at once.

        Returns:
            Whether there is anything left to prepare.
        """
        for group in list(self._running):
            self._go_on(group)
        for group in list(self._waiting):
            if len(self._running) < places and self._may_start(group):
                self._waiting.remove(group)
                self._running.append(group)
                self._go_on(group)
        return bool(self._running or self._waiting)

    def is_prepared(self, cell: Cell) -> bool:
        """Whether a cell can run; reference rows wait for one group of their problem, which fetches what they need."""
        if cell.preparation:
            return cell.preparation in self.ended
        wanted = self._problems.get(cell.problem, set())
        return not wanted or not wanted.isdisjoint(self.ended)

    @property
    def places(self) -> int:
        """How many groups are prepared for at the moment; one that waits to be tried again alone keeps its place."""
        return len(self._running)

    @property
    def processes(self) -> list[Process]:
        """The processes that prepare at the moment."""
        return [group.process for group in self._running if group.process is not None]

    @property
    def progress(self) -> dict[str, Mapping[str, Any]]:
        """What they do and how far they are: label -> progress."""
        return {label: progress for group in self._running for label, progress in group.progress.items()}

    def _may_start(self, group: _Group) -> bool:
        return all(other.begins_with.isdisjoint(group.begins_with) and not other.is_again for other in self._running)

    def _go_on(self, group: _Group) -> None:
        if next(group.steps, "ended") == "ended":
            self._running.remove(group)
            self.ended.add(group.cells[0].preparation)

    def _requirements(self, cell: Cell) -> frozenset[str]:
        return frozenset(_required(self._plan.experiments[cell.problem, cell.contender]))

    def _data_set(self, cell: Cell) -> str:
        """A name for what the feature networks of a cell's metrics are trained on."""
        data = self._plan.experiments[cell.problem, cell.contender].get("data") or {}
        return fingerprint({"data": {key: data.get(key) for key in ("dataset", "path")}})

    # ---- one group ------------------------------------------------------------------------------------

    def prepare_group(self, group: _Group) -> Iterator[None]:
        """Prepare for one group, where one of its contenders is enough; yields for as long as it takes."""
        first = {(cell.problem, cell.contender): cell for cell in reversed(group.cells)}
        for cell in sorted(first.values(), key=group.cells.index):
            self._say(f"preparing {group.place}: data, feature network, prerequisites of {cell.label}")
            failure = yield from self._prepare(group, cell)
            if failure is None:
                break
            # Whatever was killed is what they share; an error may lie in this contender's file alone.
            shared = was_killed(failure.code)
            mine = [c for c in group.cells if shared or (c.problem, c.contender) == (cell.problem, cell.contender)]
            self.failures |= {c.directory: failure for c in mine if c.directory not in self.failures}
            self._say(f"preparation failed: {failure.message} (log: {failure.log})")
            if shared:
                break

    def _prepare(self, group: _Group, cell: Cell) -> Generator[None, None, Failure | None]:
        """Prepare for one cell; what was killed is tried once more, with no other preparation beside it."""
        log = self._plan.directory / "prepare" / f"{'-'.join(filter(None, (cell.problem, cell.contender)))}.log"
        code = yield from self._attempt(group, cell, log)
        if was_killed(code):
            self._say(f"preparation {explain(code, log)}; it is tried once more")
            group.is_again = True
            while self.processes:  # they may have taken the memory
                yield
            code = yield from self._attempt(group, cell, log)
            group.is_again = False
        return None if code == 0 else Failure(explain(code, log), code, log)

    def _attempt(self, group: _Group, cell: Cell, log: Path) -> Generator[None, None, int]:
        label = f"prepare {cell.label}"
        progress = log.with_suffix(".progress.json")
        progress.unlink(missing_ok=True)
        environment = {**self._plan.policy.environment, PROGRESS_FILE: str(progress)}
        group.process = self._start(["prepare", "-c", str(cell.config_path)], log, environment, label)
        while (code := group.process.poll()) is None:
            group.progress = {label: {**read_record(progress), "phase": "preparing"}}
            yield
        group.process, group.progress = None, {}
        return code


class _Group:
    """Cells with the same data, evaluator and requirements.

    Attributes:
        cells: in the order of the plan.
        place: its number and how many there are, for people.
        begins_with: names of the trainings that may be made first for it.
        steps: prepares for it, a little with each item that is taken.
        process: the process that prepares for it at the moment, if one does.
        progress: what that does and how far it is: label -> progress.
        is_again: whether it was killed and is tried once more, alone.
    """

    def __init__(self, owner: Preparations, cells: Sequence[Cell], place: str, begins_with: frozenset[str]) -> None:
        self.cells, self.place, self.begins_with = cells, place, begins_with
        self.steps = owner.prepare_group(self)
        self.process: Process | None = None
        self.progress: Mapping[str, Mapping[str, Any]] = {}
        self.is_again = False


def _in_order(groups: Sequence[tuple[frozenset[str], list[Cell]]]) -> list[tuple[frozenset[str], list[Cell]]]:
    """One that requires no training, whose cells can soon run; then those that do, for they take long; then the others.

    Args:
        groups: required experiments and cells of each group.
    """
    quick = [group for group in groups if not group[0]]
    return [*quick[:1], *(group for group in groups if group[0]), *quick[1:]]


def _required(experiment: Mapping[str, Any]) -> Iterator[str]:
    """Fingerprints of the experiments that one requires, to any depth."""
    for needed in (experiment.get("requires") or {}).values():
        yield fingerprint({"required": needed})
        yield from _required(needed)
