"""Rows of several runs or benches side by side."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from flowbench.bench.notes import reading_notes
from flowbench.bench.results import REFERENCE, Results, is_failure, load_rows, planned_seeds
from flowbench.bench.tables import metric_table
from flowbench.core.rows import Row

__all__ = ["compare"]


def compare(run_dirs: Sequence[str | Path]) -> str:
    """Tables of the main rows of several runs: one line per run and contender, apart by data set and problem.

    Args:
        run_dirs: directories of runs (rows.jsonl) or benches (results.jsonl). Data of one name that differ in version,
            as a user's own file that was replaced, are two data sets.

    Returns:
        Text for the terminal. Metrics whose protocol differs between runs are named below the tables.

    Raises:
        ValueError: without directories, or when one holds no rows.
    """
    if not run_dirs:
        raise ValueError("nothing to compare; give the directories of at least one run or bench")
    paths = [Path(directory) for directory in run_dirs]
    rows: list[Row] = []
    seeds: dict[str, list[int]] = {}
    loaded = _told_apart([load_rows(path) for path in paths])
    for name, path, found in zip(_short_names(paths), paths, loaded, strict=True):
        label = _labels(found, name)
        rows += _relabelled(found, label, rows)
        seeds |= {label(contender): planned for contender, planned in planned_seeds(path).items()}
    console = Console(file=io.StringIO(), width=max(100, Console().width))
    failed = [row for row in rows if is_failure(row)]
    measured = [row for row in rows if not is_failure(row)]
    for dataset, problem in dict.fromkeys((row.dataset, row.problem) for row in measured):
        mine = [r for r in measured if (r.dataset, r.problem) == (dataset, problem)]
        _print_group(console, mine, failed, seeds, dataset, problem)
    for row in failed:
        console.print(f"failed: {row.contender} seed {row.seed}", markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _short_names(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to make them different."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same directory is given twice: {', '.join(str(path) for path in paths)}")


def _told_apart(loaded: list[list[Row]]) -> list[list[Row]]:
    """The rows with the version behind the data set's name, where rows of several versions meet."""
    versions: dict[str, set[str]] = {}
    for row in (row for rows in loaded for row in rows if "dataset_version" in row.provenance):
        versions.setdefault(row.dataset, set()).add(row.provenance["dataset_version"])

    def named(row: Row) -> Row:
        version = row.provenance.get("dataset_version")
        several = len(versions.get(row.dataset, ())) > 1
        return replace(row, dataset=f"{row.dataset} {version}") if several and version else row

    return [[named(row) for row in rows] for rows in loaded]


def _labels(rows: list[Row], run: str) -> Callable[[str], str]:
    """Name of a run's contender beside those of other runs: ``run: contender``, or the run alone."""
    several = len({row.contender for row in rows if row.family != REFERENCE}) > 1
    return lambda name: f"{run}: {name}" if several or name not in run.split("/") else run


def _relabelled(rows: list[Row], label: Callable[[str], str], before: list[Row]) -> list[Row]:
    """Rows under their new names; references keep theirs, each of their metrics from the first run that has it."""
    known = {(row.dataset, row.problem, row.contender, row.metric) for row in before if row.family == REFERENCE}
    out = []
    for row in rows:
        if row.family != REFERENCE:
            out.append(replace(row, contender=label(row.contender)))
        elif (row.dataset, row.problem, row.contender, row.metric) not in known:
            out.append(row)
    return out


def _print_group(
    console: Console,
    rows: list[Row],
    failed: list[Row],
    planned: Mapping[str, Sequence[int]],
    dataset: str,
    problem: str,
) -> None:
    present = {row.contender for row in rows}
    rows = [*rows, *(row for row in failed if row.problem == problem and row.contender in present)]
    results = Results(rows, {name: seeds for name, seeds in planned.items() if name in present})
    # Images that other code made are compared like contenders.
    others = [*results.external(problem), *results.references(problem)]
    names = [*(name for name in results.contenders(problem) if name not in others), *results.external(problem)]
    seeds = sorted({row.seed for row in rows})
    plan = {"contenders": names, "problems": {problem: names}, "seeds": seeds, "reasons": {}}
    console.rule(Text(f"{dataset}{f' ({problem})' if problem and problem != dataset else ''}"), align="left")
    for group in results.groups():
        table = metric_table(plan, results, problem, group)
        if table is not None:
            table.print(console)
    for metric in results.metrics(problem):
        protocols = {results.protocol(problem, name, metric) for name in names} - {""}
        if len(protocols) > 1:
            console.print(f"{metric}: not the same protocol: {' | '.join(sorted(protocols))}", markup=False)
    for note in (*results.notes, *reading_notes(results, problem)):
        console.print(note, markup=False, highlight=False)
