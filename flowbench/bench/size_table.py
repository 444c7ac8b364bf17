"""The table of quality against the number of training samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.bench.results import Results
from flowbench.bench.statistics import summarise
from flowbench.bench.tables import Entry, TextTable, format_summary

__all__ = ["size_table"]

_NOTE = (
    "Every number is of a training of its own, on samples that hold the classes in proportion; those of a smaller size "
    "are among those of a larger one of the same data seed. References and metrics take the whole training split."
)


def size_table(plan: Mapping[str, Any], results: Results, problem: str) -> TextTable | None:
    """Metrics of quality of every contender against its number of training samples, the main cells' in the last column.

    Returns:
        The table, or None where no sizes were swept or nothing of them was measured.
    """
    sizes = plan["sweep"].get("train_size", [])
    metrics = [
        m for m in results.metrics(problem) if (results.group(m), results.goal(m) != "none") == ("quality", True)
    ]
    title = "Quality against training samples" + (f": {problem}" if problem else "")
    table = TextTable(title, ["contender", "metric", *(f"{size:g}" for size in sorted(sizes)), "as trained"])
    for name in plan["problems"].get(problem, []):
        for metric in metrics:
            found = results.sweep(problem, name, metric, "train_size")
            by_column = [*(found.get(float(size), {}) for size in sorted(sizes)), results.values(problem, name, metric)]
            if found:
                unit = results.unit_of(problem, name, metric)
                label = f"{metric} ({unit})" if unit else metric
                cells = [_entry(values, len(plan["seeds"])) for values in by_column]
                table.rows.append([Entry(name), Entry(label), *cells])
    table.notes = [_NOTE]
    return table if table.rows else None


def _entry(values: Mapping[int, float], seeds: int) -> Entry:
    return Entry(format_summary(summarise(list(values.values())), seeds) if values else "–")
