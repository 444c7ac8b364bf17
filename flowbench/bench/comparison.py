"""Rows of several runs or benches side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from flowbench.bench.statistics import best_and_ties, summarise
from flowbench.bench.store import REFERENCES, Results, load_rows
from flowbench.bench.tables import Entry, TextTable, format_summary
from flowbench.bench.vocabulary import GROUPS, heading, info, order_metrics
from flowbench.evaluation.rows import Row

__all__ = ["compare"]


def compare(run_dirs: Sequence[str | Path]) -> str:
    """A table of the main rows of several runs: one table per data set, one line per run and contender.

    Args:
        run_dirs: directories of runs (rows.jsonl) or benches (results.jsonl).

    Returns:
        Text for the terminal. Metrics whose protocol differs between runs are named below their table.

    Raises:
        ValueError: without directories, or when one holds no rows.
    """
    if not run_dirs:
        raise ValueError("nothing to compare; give the directories of at least one run or bench")
    names = _short_names([Path(directory) for directory in run_dirs])
    rows = [
        _relabel(row, name, row.contender if len(names) > 1 or _is_bench(Path(directory)) else "")
        for name, directory in zip(names, run_dirs, strict=True)
        for row in load_rows(Path(directory))
    ]
    groups = list(dict.fromkeys((row.dataset, row.task) for row in rows if row.status != "failed"))
    console = Console(file=io.StringIO(), width=_width())
    for dataset, task in groups:
        _print_group(
            console, [row for row in rows if (row.dataset, row.task) == (dataset, task)], dataset, task
        )
    for row in rows:
        if row.status == "failed":
            console.print(f"failed: {row.contender} seed {row.seed}", markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _width() -> int:
    return max(80, Console().width)


def _is_bench(directory: Path) -> bool:
    return (directory / "results.jsonl").is_file()


def _short_names(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to tell them apart."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, 32):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same directory is given twice: {', '.join(str(path) for path in paths)}")


def _relabel(row: Row, run: str, contender: str) -> Row:
    own = contender and not run.endswith(contender)
    return replace(row, contender=f"{run}: {contender}" if own else run)


def _print_group(console: Console, rows: list[Row], dataset: str, task: str) -> None:
    results = Results(rows)
    contenders = results.contenders(task)
    measured = [m for m in results.metrics(task) if any(results.main_rows(task, c, m) for c in contenders)]
    metrics = [m for group in GROUPS for m in order_metrics(measured, group)]
    title = f"{dataset}{f' ({task})' if task and task != dataset else ''}"
    table = TextTable(title, ["metric", *contenders])
    for metric in metrics:
        values = {name: results.values(task, name, metric) for name in contenders}
        rivals = {name: v for name, v in values.items() if name.rsplit(": ", 1)[-1] not in REFERENCES}
        winners = best_and_ties(rivals, info(metric).goal)
        cells = [
            Entry(format_summary(summarise(list(v.values()))) if v else "–", name in winners)
            for name, v in values.items()
        ]
        table.rows.append([Entry(heading(metric, results.unit(metric))), *cells])
    console.print(table.to_rich())
    for metric in metrics:
        protocols = {
            results.protocol(task, name, metric) for name in contenders if results.values(task, name, metric)
        }
        if len(protocols) > 1:
            console.print(f"{metric}: not the same protocol: {' | '.join(sorted(protocols))}", markup=False)
