"""Rows of several runs or benches side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from flowbench.bench.notes import sample_size_notes
from flowbench.bench.store import REFERENCES, Results, load_rows
from flowbench.bench.tables import metric_table
from flowbench.bench.vocabulary import GROUPS
from flowbench.rows import Row

__all__ = ["compare"]


def compare(run_dirs: Sequence[str | Path]) -> str:
    """Tables of the main rows of several runs: one line per run and contender, apart by data set and task.

    Args:
        run_dirs: directories of runs (rows.jsonl) or benches (results.jsonl).

    Returns:
        Text for the terminal. Metrics whose protocol differs between runs are named below the tables.

    Raises:
        ValueError: without directories, or when one holds no rows.
    """
    if not run_dirs:
        raise ValueError("nothing to compare; give the directories of at least one run or bench")
    paths = [Path(directory) for directory in run_dirs]
    rows: list[Row] = []
    for name, path in zip(_short_names(paths), paths, strict=True):
        rows += _relabelled(load_rows(path), name, rows)
    console = Console(file=io.StringIO(), width=max(100, Console().width))
    measured = [row for row in rows if row.status != "failed"]
    for dataset, task in dict.fromkeys((row.dataset, row.task) for row in measured):
        _print_group(console, [r for r in measured if (r.dataset, r.task) == (dataset, task)], dataset, task)
    for row in rows:
        if row.status == "failed":
            console.print(f"failed: {row.contender} seed {row.seed}", markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _short_names(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to tell them apart."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same directory is given twice: {', '.join(str(path) for path in paths)}")


def _relabelled(rows: list[Row], run: str, before: list[Row]) -> list[Row]:
    """Rows under the names ``run: contender``; references keep theirs, from the first run only."""
    known = {(row.dataset, row.task, row.contender) for row in before}
    several = len({row.contender for row in rows} - set(REFERENCES)) > 1
    out = []
    for row in rows:
        if row.contender not in REFERENCES:
            name = f"{run}: {row.contender}" if several or row.contender not in run.split("/") else run
            out.append(replace(row, contender=name))
        elif (row.dataset, row.task, row.contender) not in known:
            out.append(row)
    return out


def _print_group(console: Console, rows: list[Row], dataset: str, task: str) -> None:
    results = Results(rows)
    names = [name for name in results.contenders(task) if name not in REFERENCES]
    seeds = sorted({row.seed for row in rows})
    plan = {"contenders": names, "tasks": {task: names}, "seeds": seeds, "reasons": {}}
    console.rule(f"{dataset}{f' ({task})' if task and task != dataset else ''}", align="left")
    for group in GROUPS:
        table = metric_table(plan, results, task, group)
        if table is not None:
            table.print(console)
    for metric in results.metrics(task):
        protocols = {results.protocol(task, name, metric) for name in names} - {""}
        if len(protocols) > 1:
            console.print(f"{metric}: not the same protocol: {' | '.join(sorted(protocols))}", markup=False)
    for note in sample_size_notes(rows):
        console.print(note, markup=False, highlight=False)
