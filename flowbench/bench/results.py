"""Results: rows of all cells gathered into results.jsonl and results.csv, and looked up in memory."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flowbench.bench.seed_axes import Seeds
from flowbench.bench.status import read_status
from flowbench.config.references import DEFAULT_REFERENCES
from flowbench.core.rows import FLOOR_FILE, Goal, Row, read_rows, write_rows
from flowbench.core.storage import write_text
from flowbench.core.sweep import BEST, SweepAxis

__all__ = [
    "EXTERNAL",
    "REFERENCE",
    "UNFINISHED",
    "Results",
    "cell_rows",
    "collect",
    "csv_text",
    "is_failure",
    "load_plan",
    "load_rows",
    "planned_seeds",
]

REFERENCE = "reference"
"""Family of their rows."""

EXTERNAL = "external"
"""Folder of a bench with the rows of images that other code made, and the family of those rows."""

CELL = "cell"
"""Metric of the row of a failed cell."""

CELL_AXES = ("train_size", "evaluation_seed")
"""Axes whose rows are of cells beside the main one, so that they say nothing of its end."""

UNFINISHED = "not finished"

_SHORT = 80  # characters of a failed cell's message where it is mentioned; the report lists it in full
_WEIGHT_ORDER = {"ema": 0, "none": 1, "raw": 2}


def load_plan(directory: Path) -> dict[str, Any]:
    """Read plan.json of a bench directory.

    Raises:
        ValueError: when the directory holds no bench.
    """
    path = directory / "plan.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no bench (no plan.json); run `flowbench bench -c FILE` first") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run the bench again, finished cells are kept") from None
    return _with_problems(plan)


def _with_problems(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan of an earlier version, in which problems were called tasks and had the same references, as of today."""
    if "problems" not in plan:
        cells = [{"problem" if key == "task" else key: value for key, value in cell.items()} for cell in plan["cells"]]
        plan = {"problems" if key == "tasks" else key: value for key, value in plan.items()} | {"cells": cells}
    return {"references": {name: list(DEFAULT_REFERENCES) for name in plan["problems"]}, **plan}


def planned_seeds(directory: Path) -> dict[str, list[int]]:
    """The seeds that each contender of a bench should have; empty for the directory of a run."""
    if not (directory / "plan.json").is_file():
        return {}
    plan = load_plan(directory)
    return {name: list(plan["seeds"]) for name in plan["contenders"]}


def load_rows(directory: Path) -> list[Row]:
    """The rows of a bench directory (results.jsonl) or of one run (rows.jsonl, and the floor's beside them).

    Raises:
        ValueError: when there are none or a line is not a row.
    """
    if (directory / "results.jsonl").is_file():
        return read_rows(directory / "results.jsonl")
    if (directory / "rows.jsonl").is_file():
        rows, floor = read_rows(directory / "rows.jsonl"), directory / FLOOR_FILE
        return [*rows, *(read_rows(floor) if floor.is_file() else [])]
    raise ValueError(f"{directory} holds neither results.jsonl nor rows.jsonl; give the directory of a run or a bench")


def cell_rows(directory: Path, cell: Mapping[str, Any], bench: str) -> list[Row]:
    """The rows that one finished cell wrote, under the names of today.

    Args:
        directory: the cell's run directory.
        cell: its entry in plan.json.
        bench: name of the bench.

    Raises:
        ValueError: when the file is missing, empty, damaged, or belongs to another cell.
    """
    path = directory / "rows.jsonl"
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} is empty; the cell measured nothing")
    reference = cell["kind"] == "reference"
    names = (bench, cell["problem"], *([] if reference else [cell["contender"]]))
    written = read_status(directory).names or _names(rows[0], reference)
    for number, row in enumerate(rows, start=1):
        got = _names(row, reference)
        mine = got in (names, tuple(written[: len(names)])) and reference == (row.family == REFERENCE)
        if not mine or (not reference and row.seed != cell["seed"]):
            found = "/".join(filter(None, (row.bench, row.problem, row.contender)))
            wanted = "/".join(filter(None, (bench, cell["problem"], cell["contender"])))
            raise ValueError(
                f"{path}, row {number}: belongs to {found} seed {row.seed}, expected {wanted} seed {cell['seed']}"
            )
    if cell.get("axis"):
        rows = [replace(row, axis=cell["axis"], at=float(cell["at"])) for row in rows if not row.axis]
    return [replace(row, **dict(zip(("bench", "problem", "contender"), names, strict=False))) for row in rows]


def _names(row: Row, reference: bool) -> tuple[str, ...]:
    """Bench, problem and contender of a row; each reference is a contender of its own."""
    return (row.bench, row.problem) if reference else (row.bench, row.problem, row.contender)


def collect(directory: Path) -> list[Row]:
    """Gather the rows of all cells, and of external samples, into results.jsonl and results.csv, atomically.

    A failed cell becomes one row with metric ``cell``, status ``failed`` and the path of its log in the
    provenance.

    Raises:
        ValueError: when a finished cell's rows are damaged.
    """
    plan = load_plan(directory)
    rows: list[Row] = []
    for cell in plan["cells"]:
        folder = directory / cell["directory"]
        status = read_status(folder)
        if status.state == "DONE":
            rows += cell_rows(folder, cell, plan["name"])
        elif status.state == "FAILED":
            rows.append(_failed_row(plan["name"], cell, folder))
    for path in sorted((directory / EXTERNAL).glob("*/rows.jsonl")):
        rows += [_external_row(plan, row) for row in read_rows(path)]
    write_rows(directory / "results.jsonl", rows)
    write_text(directory / "results.csv", csv_text(rows))
    return rows


def _external_row(plan: Mapping[str, Any], row: Row) -> Row:
    """A row of external samples under the bench's present names; a name that is taken gets a suffix."""
    (problem,) = plan["problems"] if len(plan["problems"]) == 1 else (row.problem,)
    taken = row.contender in (*plan["contenders"], *plan["references"].get(problem, ()))
    name = f"{row.contender} ({EXTERNAL})" if taken else row.contender
    return replace(row, bench=plan["name"], problem=problem, contender=name)


def _failed_row(bench: str, cell: Mapping[str, Any], folder: Path) -> Row:
    status = read_status(folder)
    provenance = {
        "log": str((folder / status.log).resolve()),
        "exit_code": status.exit_code,
        "attempts": status.attempts,
        "message": status.message,
    }
    return Row(
        bench=bench,
        problem=cell["problem"],
        contender=cell["contender"],
        family="",
        dataset="",
        seed=cell["seed"],
        metric=CELL,
        axis=cell.get("axis", ""),
        at=cell.get("at"),
        value=None,
        n=None,
        protocol="",
        unit="",
        network_evaluations=None,
        weights="none",
        status="failed",
        provenance=provenance,
    )


def csv_text(rows: Iterable[Row]) -> str:
    """Rows as CSV, one column per field and per provenance entry (nested entries as JSON)."""
    rows = list(rows)
    names = [f.name for f in fields(Row) if f.name != "provenance"]
    extra = sorted({key for row in rows for key in row.provenance})
    handle = io.StringIO()
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow([*names, *(f"provenance.{key}" for key in extra)])
    for row in rows:
        values = (row.provenance.get(key) for key in extra)
        cells = (json.dumps(v, sort_keys=True) if isinstance(v, (dict, list)) else v for v in values)
        writer.writerow([*(getattr(row, name) for name in names), *cells])
    return handle.getvalue()


class Results:
    """Lookup of rows by problem, contender, metric, seed and point of a sweep.

    Rows of EMA weights are preferred over raw ones. Where a metric was measured under several protocols, the
    first in alphabetical order is shown and the others are named in ``notes``.

    Args:
        rows: of all cells.
        seeds: training seeds that each contender should have, by name; one that is not named should have those of
            its own rows.
        crossed: axes of the training seeds that the bench crosses, if it crosses any: trainings then share seeds.

    Example:
        >>> from flowbench.core.rows import Row
        >>> named = dict(bench="b", problem="", contender="cfm", family="FlowMatching", dataset="digits", metric="fd")
        >>> rest = dict(n=360, protocol="", unit="", goal="down", network_evaluations=32, weights="ema")
        >>> results = Results([Row(**named, **rest, seed=seed, value=value) for seed, value in ((0, 1.0), (1, 3.0))])
        >>> results.values("", "cfm", "fd"), results.mean("", "cfm", "fd")
        ({0: 1.0, 1: 3.0}, 2.0)
    """

    def __init__(
        self,
        rows: Iterable[Row],
        seeds: Mapping[str, Sequence[int]] | None = None,
        crossed: Sequence[str] = (),
    ) -> None:
        self.rows = list(rows)
        self.seeds = dict(seeds or {})
        self.crossed = tuple(crossed)
        self.notes: list[str] = []
        self._main: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        self._swept: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        self._ended: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)  # seed -> why its cell failed, or ""
        # Goal and group; of two versions of a metric the later one counts.
        self._infos: dict[str, tuple[Goal, str]] = {}
        self._members: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # problem and family -> names
        for row in self.rows:
            self._members[row.problem, row.family][row.contender] = None
            failed = is_failure(row)
            if row.axis not in CELL_AXES:
                self._ended[row.problem, row.contender].setdefault(row.seed, _failure(row) if failed else "")
            if failed:
                continue
            self._infos[row.metric] = row.goal, row.group
            table = self._swept if row.axis else self._main
            table[row.problem, row.contender, row.metric].append(row)
        self._main = {key: self._prefer(key, group) for key, group in self._main.items()}

    @classmethod
    def of_bench(cls, plan: Mapping[str, Any], rows: Iterable[Row]) -> Results:
        """The results of a bench directory; its plan lists the seeds."""
        return cls(rows, {name: plan["seeds"] for name in plan["contenders"]}, Seeds.of_plan(plan).crossed)

    def _prefer(self, key: tuple[str, str, str], group: list[Row]) -> list[Row]:
        group = _preferred_weights(group)
        protocols = sorted({row.protocol for row in _measured(group)}) or [""]
        if len(protocols) > 1:
            problem, contender, metric = key
            where = f"{problem}/{contender}" if problem else contender
            self.notes.append(
                f"{where}.{metric}: shown under {protocols[0]}; also measured: {', '.join(protocols[1:])}"
            )
        return [row for row in group if row.status == "failed" or row.protocol == protocols[0]]

    def contenders(self, problem: str) -> list[str]:
        """Contenders that have rows in a problem, in order of appearance."""
        return list(dict.fromkeys(row.contender for row in self.rows if row.problem == problem and not is_failure(row)))

    def external(self, problem: str) -> list[str]:
        """Names of the samples in a problem that other code made."""
        return list(self._members.get((problem, EXTERNAL), ()))

    def references(self, problem: str) -> list[str]:
        """Names of the reference rows of a problem, in order of appearance."""
        return list(self._members.get((problem, REFERENCE), ()))

    def lines(self, problem: str, contenders: Iterable[str]) -> list[str]:
        """The contenders in the tables of a problem, in their order, each once.

        Args:
            problem: problem name.
            contenders: those of the plan.

        Returns:
            The contenders, then what other code made, then the references.
        """
        return list(dict.fromkeys([*contenders, *self.external(problem), *self.references(problem)]))

    def is_reference(self, problem: str, contender: str) -> bool:
        """Whether a name is that of reference rows, which are computed once and count as constants."""
        return contender in self.references(problem)

    def metrics(self, problem: str, contender: str | None = None) -> list[str]:
        """Metrics measured in a problem, in order of appearance."""
        return list(
            dict.fromkeys(
                metric for (t, c, metric) in (*self._main, *self._swept) if t == problem and contender in (None, c)
            )
        )

    def goal(self, metric: str) -> Goal:
        """Which value of a metric is better, as its rows state."""
        return self._infos[metric][0] if metric in self._infos else "none"

    def group(self, metric: str) -> str:
        """The table that a metric belongs to."""
        return self._infos[metric][1] if metric in self._infos else "quality"

    def groups(self) -> list[str]:
        """The tables that occur, in the order of their first metrics."""
        return list(dict.fromkeys(group for _, group in self._infos.values()))

    def headline(self, metrics: Iterable[str]) -> str | None:
        """The metric that pictures show: the first of quality of which less is better; None where there is none."""
        return next((m for m in metrics if self.group(m) == "quality" and self.goal(m) == "down"), None)

    def main_rows(self, problem: str, contender: str, metric: str) -> list[Row]:
        """The rows of a metric outside any sweep, one per seed."""
        return self._main.get((problem, contender, metric), [])

    def values(
        self,
        problem: str,
        contender: str,
        metric: str,
        at: float | None = None,
        axis: SweepAxis = "network_evaluations",
    ) -> dict[int, float]:
        """Values per seed that are finite and have converged.

        Args:
            problem: problem name, empty for the unnamed one.
            contender: name in the bench file or of a reference.
            metric: metric name.
            at: None for the main rows, else the point of the sweep.
            axis: what the sweep imposes.
        """
        rows = self._rows_at(problem, contender, metric, at, axis)
        return {row.seed: row.value for row in rows if may_decide(row) and row.value is not None}

    def doubtful(
        self,
        problem: str,
        contender: str,
        metric: str,
        at: float | None = None,
        axis: SweepAxis = "network_evaluations",
    ) -> dict[int, tuple[float, str]]:
        """Values per seed that do not count, and why (not converged); the arguments are those of :meth:`values`."""
        rows = self._rows_at(problem, contender, metric, at, axis)
        return {row.seed: (row.value, _message(row)) for row in rows if row.value is not None and not may_decide(row)}

    def _rows_at(self, problem: str, contender: str, metric: str, at: float | None, axis: SweepAxis) -> list[Row]:
        if at is None and not axis.startswith(BEST):
            return self.main_rows(problem, contender, metric)
        swept = _preferred_weights(self._swept.get((problem, contender, metric), []))
        return [row for row in swept if _is_at(row, at, axis)]

    def mean(self, problem: str, contender: str, metric: str) -> float | None:
        """Mean of the finite values outside any sweep; None where there are none."""
        values = self.values(problem, contender, metric)
        return sum(values.values()) / len(values) if values else None

    def sweep(
        self, problem: str, contender: str, metric: str, axis: SweepAxis = "network_evaluations"
    ) -> dict[float, dict[int, float]]:
        """Point of the sweep -> seed -> value that has converged, from the rows of one axis."""
        points = self.swept_points(problem, contender, metric, axis)
        found = {at: self.values(problem, contender, metric, at, axis) for at in points}
        return {at: values for at, values in found.items() if values}

    def swept_points(
        self, problem: str, contender: str, metric: str, axis: SweepAxis = "network_evaluations"
    ) -> list[float]:
        """The points of a sweep, in order, at which there is a value, converged or not."""
        rows = _preferred_weights(self._swept.get((problem, contender, metric), []))
        return sorted({float(r.at) for r in rows if r.value is not None and r.at is not None and r.axis == axis})

    def gaps(
        self,
        problem: str,
        contender: str,
        metric: str,
        at: float | None = None,
        axis: SweepAxis = "network_evaluations",
    ) -> dict[int, str]:
        """Seeds that a contender should have a finite number of, and has not, with the reason of each.

        The arguments are those of :meth:`values`. References and external samples are not trained and have no seeds
        and no gaps.
        """
        if contender not in self.seeds and contender in (*self.references(problem), *self.external(problem)):
            return {}
        present = self.values(problem, contender, metric, at, axis)
        ended = self._ended.get((problem, contender), {})
        return {
            seed: ended.get(seed, UNFINISHED) or self._why_missing(problem, contender, metric, at, axis, seed)
            for seed in self.seeds.get(contender, sorted(ended))
            if seed not in present
        }

    def lost_seeds(self, problem: str, contender: str) -> dict[int, str]:
        """Seeds whose cell failed or is not finished, with the reason of each: those that lack every number."""
        ended = self._ended.get((problem, contender), {})
        lost = {seed: ended.get(seed, UNFINISHED) for seed in self.seeds.get(contender, sorted(ended))}
        return {seed: reason for seed, reason in lost.items() if reason}

    def _why_missing(
        self, problem: str, contender: str, metric: str, at: float | None, axis: SweepAxis, seed: int
    ) -> str:
        """Why a finished cell has no number of a metric."""
        named = (problem, contender, metric, seed)
        found = [r for r in self.rows if (r.problem, r.contender, r.metric, r.seed) == named and _is_at(r, at, axis)]
        doubtful = [row for row in found if row.value is not None and not may_decide(row)]
        if doubtful:
            return _message(doubtful[0])
        empty = [row for row in found if row.value is None]
        if empty:
            message = empty[0].provenance.get("message")
            words = {"nonfinite": "not finite", "failed": f"failed: {message}"}
            return words.get(empty[0].status, str(message or empty[0].status))
        return "measured with other weights or under another protocol" if found else "not measured"

    def protocol(self, problem: str, contender: str, metric: str) -> str:
        """Protocol of a metric's main rows, empty when there are none."""
        rows = _measured(self.main_rows(problem, contender, metric))
        return rows[0].protocol if rows else ""

    def unit_of(self, problem: str, contender: str, metric: str) -> str:
        """Unit of one contender's rows of a metric, swept or not."""
        key = (problem, contender, metric)
        rows = _measured(self._main.get(key, [])) or _measured(self._swept.get(key, []))
        return rows[0].unit if rows else ""

    def units(self, problem: str, metric: str) -> dict[str, list[str]]:
        """Unit -> contenders measured in it; numbers in different units cannot be compared."""
        found: dict[str, list[str]] = {}
        for (row_problem, contender, name), rows in self._main.items():
            if (row_problem, name) == (problem, metric) and _measured(rows):
                found.setdefault(_measured(rows)[0].unit, []).append(contender)
        return found

    def unit(self, problem: str, metric: str) -> str:
        """The unit of a metric in a problem; empty where it has none, or several."""
        found = self.units(problem, metric)
        return next(iter(found)) if len(found) == 1 else ""

    def failures(self) -> list[Row]:
        """Rows of failed cells."""
        return [row for row in self.rows if is_failure(row)]


def _is_at(row: Row, at: float | None, axis: SweepAxis) -> bool:
    """Whether a row was measured at a point of a sweep; None: outside any sweep."""
    if axis.startswith(BEST) and at is None:  # each seed at its own point
        return row.axis == axis
    return (row.axis, row.at) == ("", None) if at is None else (row.axis, row.at) == (axis, at)


def _measured(rows: Iterable[Row]) -> list[Row]:
    """Rows that are of a measurement, and do not stand for one that could not be made."""
    return [row for row in rows if row.status != "failed"]


def may_decide(row: Row) -> bool:
    """Whether a row's number takes part in means and claims: the only place that decides it."""
    return row.status == "ok" and row.value is not None


def _message(row: Row) -> str:
    return str(row.provenance.get("message") or row.status)


def is_failure(row: Row) -> bool:
    """Whether a row stands for a cell that failed, and for no number."""
    return row.status == "failed" and row.metric == CELL


def _failure(row: Row) -> str:
    message = " ".join(str(row.provenance.get("message") or "").split())
    short = f"{message[:_SHORT]}..." if len(message) > _SHORT else message
    return f"failed ({short})" if short else "failed"


def _preferred_weights(rows: list[Row]) -> list[Row]:
    best = min((_WEIGHT_ORDER[row.weights] for row in rows), default=0)
    return [row for row in rows if _WEIGHT_ORDER[row.weights] == best]
