"""Numbers at the point of a sweep that was chosen for each cell on the validation split, and the choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.bench.results import Results
from flowbench.bench.statistics import summarise
from flowbench.bench.tables import Entry, TextTable, format_summary
from flowbench.core.sweep import BEST, SWEEP_AXES, best_axis

__all__ = ["check_best", "tuned_table"]


def check_best(axis: str, sweep: Mapping[Any, Any], best_by: str) -> None:
    """Refuse a claim about the best point of an axis where none is chosen.

    Args:
        axis: of the claim's side.
        sweep: of the bench.
        best_by: the number by which the bench chooses; empty where it does not.

    Raises:
        ValueError: the axis is not swept, or nothing is named to choose by.
    """
    if not axis.startswith(BEST):
        return
    swept = axis.removeprefix(BEST)
    if not sweep.get(swept):
        raise ValueError(f"@{swept}=best chooses among the points of a sweep, and sweep.{swept} is not given")
    if not best_by:
        raise ValueError(f"@{swept}=best needs what it is chosen by; give e.g. best_by: fd[digits-cnn]")


def tuned_table(plan: Mapping[str, Any], results: Results, problem: str) -> TextTable | None:
    """Every contender at its best point of each axis; None where none was chosen."""
    title = "Tuned on the validation split" + (f": {problem}" if problem else "")
    names = plan["problems"].get(problem, [])
    metrics = [m for m in results.metrics(problem) if any(_values(results, problem, n, m) for n in names)]
    table = TextTable(title, ["contender", "axis", "chosen", *metrics])
    for name in names:
        for axis in SWEEP_AXES:
            found = [results.values(problem, name, metric, axis=best_axis(axis)) for metric in metrics]
            if any(found):
                points = {at for m in metrics for at in results.swept_points(problem, name, m, best_axis(axis))}
                chosen = ", ".join(f"{at:g}" for at in sorted(points))
                cells = [_entry(values, len(plan["seeds"])) for values in found]
                table.rows.append([Entry(name), Entry(axis.replace("_", " ")), Entry(chosen), *cells])
    by = plan.get("best_by") or "value"
    table.notes = [
        f"Each cell's point is the one with the best {by} on the validation split, from samples that are used for "
        "nothing else; the numbers are those of the test measurement at that point."
    ]
    return table if table.rows else None


def _values(results: Results, problem: str, name: str, metric: str) -> bool:
    return any(results.values(problem, name, metric, axis=best_axis(axis)) for axis in SWEEP_AXES)


def _entry(values: Mapping[int, float], seeds: int) -> Entry:
    return Entry(format_summary(summarise(list(values.values())), seeds) if values else "–")
