"""Tables of a report: built once from the rows, written as Markdown or shown by Rich."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowbench.bench.statistics import Summary, best_and_ties, paired_difference, summarise
from flowbench.bench.store import REFERENCES, Results
from flowbench.bench.vocabulary import GROUPS, Group, heading, info, order_metrics

__all__ = [
    "Entry",
    "TextTable",
    "difference_table",
    "format_summary",
    "metric_table",
    "seed_table",
]

_NOTHING = "–"


@dataclass(frozen=True)
class Entry:
    """One cell of a table."""

    text: str
    bold: bool = False
    italic: bool = False

    @property
    def markdown(self) -> str:
        """The text with its emphasis in Markdown."""
        mark = "**" if self.bold else "_" if self.italic else ""
        return f"{mark}{self.text}{mark}"

    @property
    def rich(self) -> Text:
        """The text with its emphasis for Rich."""
        return Text(self.text, style="bold" if self.bold else "italic" if self.italic else "")


@dataclass
class TextTable:
    """A table without a style of its own."""

    title: str
    header: list[str]
    rows: list[list[Entry]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        """A GitHub table; the first column is left-aligned, the others right-aligned."""
        lines = [self._line(self.header), "|" + "|".join([":---"] + ["---:"] * (len(self.header) - 1)) + "|"]
        lines += [self._line([entry.markdown for entry in row]) for row in self.rows]
        lines += [f"\n{note}" for note in self.notes]
        return "\n".join(lines)

    def print(self, console: Console) -> None:
        """Print the table; one wider than the console is printed as several that repeat the first column."""
        for number, columns in enumerate(self._pages(console.width)):
            title = Text(f"{self.title}{' (continued)' if number else ''}", style="bold")
            table = Table(title=title, title_justify="left", title_style="")
            for position in columns:
                table.add_column(Text(self.header[position]), justify="right" if position else "left")
            for row in self.rows:
                table.add_row(*(row[position].rich for position in columns))
            console.print(table)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)

    def _pages(self, width: int) -> list[list[int]]:
        """Columns of each page, so that a page is at most ``width`` characters wide where that is possible."""
        wide = [
            max(cell_len(text) for text in (name, *(row[position].text for row in self.rows))) + 3
            for position, name in enumerate(self.header)
        ]
        pages: list[list[int]] = [[0]]
        for position in range(1, len(wide)):
            if len(pages[-1]) > 1 and 1 + sum(wide[p] for p in (*pages[-1], position)) > width:
                pages.append([0])
            pages[-1].append(position)
        return pages

    @staticmethod
    def _line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def format_summary(summary: Summary, seeds: int | None = None) -> str:
    """``mean ± half`` with as many digits as the interval supports; ``(n=2)`` where seeds are missing.

    Args:
        summary: what to write.
        seeds: how many seeds the reader expects; None says nothing about n.
    """
    count = f" (n={summary.n})" if seeds is not None and summary.n != seeds else ""
    if not summary.half:  # one seed, or a number that training does not change
        return f"{_number(summary.mean, None)}{count}"
    decimals = _decimals(summary.mean, summary.half)
    return f"{_number(summary.mean, decimals)} ± {_number(summary.half, decimals)}{count}"


def _decimals(mean: float, half: float) -> int | None:
    """Digits after the point that show two digits of the interval; None means scientific notation."""
    size = max(abs(mean), half)
    if size == 0 or size >= 1e5 or size < 1e-3:
        return None
    wanted = 1 - math.floor(math.log10(half)) if half > 0 else 3
    return max(0, min(wanted, 5 - math.floor(math.log10(size)), 6))


def _number(value: float, decimals: int | None) -> str:
    if decimals is None and value == int(value) and abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"


def metric_table(plan: Mapping[str, Any], results: Results, task: str, group: Group) -> TextTable | None:
    """Contenders and references against the metrics of one group; the best value and its ties are bold.

    Args:
        plan: content of plan.json.
        results: the rows.
        task: task name.
        group: ``quality``, ``transport`` or ``cost``.

    Returns:
        The table, or None when nothing of the group was measured.
    """
    metrics = order_metrics((m for m in results.metrics(task) if _has_main(results, task, m)), group)
    if not metrics:
        return None
    table = TextTable(_title(group, task), ["contender", *(heading(m, results.unit(task, m)) for m in metrics)])
    entered = plan["tasks"].get(task, [])
    winners = {m: _winners(results, task, entered, m) for m in metrics}
    for name in plan["contenders"]:
        if name not in entered:
            reason = Entry(f"not applicable: {plan['reasons'].get(task, '')}")
            table.rows.append([Entry(name), reason, *[Entry("")] * (len(metrics) - 1)])
            continue
        seeds = len(plan["seeds"])
        cells = [_entry(results, task, name, m, name in winners[m], seeds) for m in metrics]
        table.rows.append([Entry(name), *cells])
    for name in (*results.external(task), *REFERENCES):
        cells = [_entry(results, task, name, m, False, None) for m in metrics]
        if any(cell.text != _NOTHING for cell in cells):
            table.rows.append([Entry(name, italic=True), *cells])
    table.notes = [note for metric in metrics if (note := _unit_note(results, task, metric))]
    return table


def _unit_note(results: Results, task: str, metric: str) -> str:
    """A line for a metric that contenders measure in different units."""
    units = results.units(task, metric)
    if len(units) < 2:
        return ""
    parts = [f"{', '.join(names)} in {unit or 'no unit'}" for unit, names in units.items()]
    return f"{metric} cannot be compared: {'; '.join(parts)}."


def _has_main(results: Results, task: str, metric: str) -> bool:
    return any(results.main_rows(task, contender, metric) for contender in results.contenders(task))


def _title(group: Group, task: str) -> str:
    names = {"quality": "Quality", "transport": "How the samples travel", "cost": "Cost"}
    return names[group] + (f": {task}" if task else "")


def _winners(results: Results, task: str, entered: Sequence[str], metric: str) -> set[str]:
    if len(results.units(task, metric)) > 1:
        return set()
    by_contender = {name: results.values(task, name, metric) for name in entered}
    return best_and_ties(by_contender, info(metric).goal)


def _entry(results: Results, task: str, name: str, metric: str, bold: bool, seeds: int | None) -> Entry:
    rows = results.main_rows(task, name, metric)
    values = results.values(task, name, metric)
    if not values:
        return Entry("not finite" if any(row.status == "nonfinite" for row in rows) else _NOTHING)
    bound = "≤ " if results.protocol(task, name, metric).startswith("bound") else ""
    return Entry(bound + format_summary(summarise(list(values.values())), seeds), bold)


def difference_table(plan: Mapping[str, Any], results: Results, task: str) -> TextTable | None:
    """Paired differences of every contender to the first one, by metric; None with one contender."""
    entered = plan["tasks"].get(task, [])
    measured = [m for m in results.metrics(task) if _has_main(results, task, m)]
    metrics = [m for group in GROUPS[:2] for m in order_metrics(measured, group)]
    if len(entered) < 2 or not metrics:
        return None
    first, *others = entered
    title = f"Differences to {first}" + (f": {task}" if task else "")
    table = TextTable(title, ["metric", *(f"{name} − {first}" for name in others)])
    for metric in metrics:
        base = results.values(task, first, metric)
        if len(results.units(task, metric)) > 1:
            continue
        cells = [_difference_entry(results.values(task, name, metric), base) for name in others]
        if any(cell.text != _NOTHING for cell in cells):
            table.rows.append([Entry(heading(metric, results.unit(task, metric))), *cells])
    return table if table.rows else None


def _difference_entry(left: Mapping[int, float], right: Mapping[int, float]) -> Entry:
    difference = paired_difference(left, right)
    if difference is None:
        return Entry(_NOTHING)
    sign = "+" if difference.mean > 0 else ""
    tie = {True: " (tie)", False: "", None: " (n=1)"}[difference.is_tie]
    return Entry(f"{sign}{format_summary(difference)}{tie}", bold=difference.is_tie is False)


def seed_table(plan: Mapping[str, Any], results: Results, task: str) -> TextTable | None:
    """Every value of every seed, main rows only."""
    metrics = [m for m in results.metrics(task) if _has_main(results, task, m)]
    if not metrics:
        return None
    table = TextTable(f"Per seed{f': {task}' if task else ''}", ["contender", "seed", *metrics])
    names = [*plan["tasks"].get(task, []), *REFERENCES]
    for name in names:
        by_metric = {metric: results.values(task, name, metric) for metric in metrics}
        for seed in sorted({seed for values in by_metric.values() for seed in values}):
            cells = [Entry(f"{v[seed]:.6g}" if seed in v else _NOTHING) for v in by_metric.values()]
            table.rows.append([Entry(name), Entry(str(seed)), *cells])
    return table
