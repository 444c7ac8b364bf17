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

from flowbench.bench.frechet import LOTTERY, LOTTERY_SOURCE, is_inside_lottery
from flowbench.bench.results import Results
from flowbench.bench.statistics import ROUNDING, Summary, best_and_ties, paired_difference, summarise
from flowbench.core.rows import Goal, unmeasured_text

__all__ = [
    "COST",
    "Entry",
    "TextTable",
    "difference_table",
    "format_summary",
    "metric_table",
    "seed_table",
]

COST = "cost"
"""Group of what training and sampling cost: no claim of quality, and no difference that a seed could decide."""

_TITLES = {"transport": "Sampling paths"}
_ARROWS: dict[Goal, str] = {"down": " ↓", "up": " ↑", "zero": " → 0", "none": ""}
_NOTHING = "–"
_LUCK = " ≈"
"""Marks a gap between two Frechet distances that another training seed may turn."""
_MARK = " †"
"""Marks a number that lacks a planned seed; a note below the table names the seed and the reason."""
_UNCONVERGED = " ‡"
"""Marks a number in grey that has not converged; a note below the table says so."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table."""

    text: str
    bold: bool = False
    italic: bool = False
    grey: bool = False

    @property
    def markdown(self) -> str:
        """The text with its emphasis in Markdown; grey in HTML."""
        if self.grey:
            return f'<span style="color:grey">{self.text}</span>'
        mark = "**" if self.bold else "_" if self.italic else ""
        return f"{mark}{self.text}{mark}"

    @property
    def rich(self) -> Text:
        """The text with its emphasis for Rich."""
        if self.grey:
            return Text(self.text, style="bright_black")
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
        seeds: planned number of seeds; with None, n is not printed.
    """
    count = f" (n={summary.n})" if seeds is not None and summary.n != seeds else ""
    # One seed, or a number that training does not change.
    if not summary.half or summary.half <= ROUNDING * abs(summary.mean):
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


def metric_table(plan: Mapping[str, Any], results: Results, problem: str, group: str) -> TextTable | None:
    """Contenders and references against the metrics of one group; the best value and its ties are bold.

    Args:
        plan: content of plan.json.
        results: the rows.
        problem: problem name.
        group: one of :meth:`Results.groups`, e.g. ``quality``.

    Returns:
        The table, or None when nothing of the group was measured.
    """
    metrics = [m for m in _measured(results, problem) if results.group(m) == group]
    if not metrics:
        return None
    table = TextTable(_title(group, problem), ["contender", *(_heading(results, problem, m) for m in metrics)])
    entered = plan["problems"].get(problem, [])
    winners = {m: _winners(results, problem, entered, m) for m in metrics}
    for name in results.lines(problem, plan["contenders"]):
        planned = name in plan["contenders"]
        if planned and name not in entered:
            reason = Entry(f"not applicable: {plan['reasons'].get(problem, '')}")
            table.rows.append([Entry(name), reason, *[Entry("")] * (len(metrics) - 1)])
            continue
        seeds = len(plan["seeds"]) if planned else None
        cells = [_entry(results, problem, name, m, name in winners[m], seeds) for m in metrics]
        if planned or any(cell.text != _NOTHING for cell in cells):
            mark = _MARK if results.lost_seeds(problem, name) and planned else ""
            table.rows.append([Entry(name + mark, italic=not planned), *cells])
    table.notes = [note for metric in metrics if (note := _unit_note(results, problem, metric))]
    table.notes += _gap_notes(results, problem, entered, metrics)
    table.notes += _unconverged_notes(results, problem, metrics)
    table.notes += _failure_notes(results, problem, metrics)
    return table


def _unconverged_notes(results: Results, problem: str, metrics: Sequence[str]) -> list[str]:
    """A line for numbers that have not converged on any seed, each with the reason of its first one."""
    parts = []
    for name in results.contenders(problem):
        for metric in metrics:
            if _is_grey(results, problem, name, metric):
                found = results.doubtful(problem, name, metric)
                parts.append(f"{name} {metric} {found[min(found)][1]}")
    if not parts:
        return []
    return [
        f"{_UNCONVERGED.strip()}, in grey: in no claim, and never marked as best or as different: {'; '.join(parts)}."
    ]


def _failure_notes(results: Results, problem: str, metrics: Sequence[str]) -> list[str]:
    """A line for what could not be computed of references and external samples, which have no seeds to lack."""
    names = [*results.external(problem), *results.references(problem)]
    failed = [row for name in names for m in metrics for row in results.main_rows(problem, name, m)]
    text = unmeasured_text(row for row in failed if row.status == "failed")
    return [f"Not measured: {text}."] if text else []


def _gap_notes(results: Results, problem: str, entered: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """A line that names every contender without a number for a planned seed; empty where none lacks one."""
    parts: list[str] = []
    for name in entered:
        lost = results.lost_seeds(problem, name)
        parts += [f"{name} {_seeds(numbers)} {reason}" for reason, numbers in _by_reason(lost).items()]
        for metric in metrics:
            if not _has_rows(results, problem, name, metric):
                continue
            if _is_grey(results, problem, name, metric):
                continue
            gaps = {s: reason for s, reason in results.gaps(problem, name, metric).items() if s not in lost}
            parts += [f"{name} {_seeds(numbers)} {metric} {reason}" for reason, numbers in _by_reason(gaps).items()]
    if not parts:
        return []
    return [f"†: over fewer seeds than planned, so never marked as best or as different: {'; '.join(parts)}."]


def _by_reason(gaps: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for seed, reason in gaps.items():
        found.setdefault(reason, []).append(seed)
    return found


def _seeds(numbers: Sequence[int]) -> str:
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _has_rows(results: Results, problem: str, name: str, metric: str) -> bool:
    """Whether a contender was measured by a metric, be it without success."""
    return bool(results.main_rows(problem, name, metric))


def _is_grey(results: Results, problem: str, name: str, metric: str) -> bool:
    """Whether all that was computed of a number has not converged."""
    return not results.values(problem, name, metric) and bool(results.doubtful(problem, name, metric))


def _is_complete(results: Results, problem: str, name: str, metric: str) -> bool:
    return not results.gaps(problem, name, metric)


def _unit_note(results: Results, problem: str, metric: str) -> str:
    """A line for a metric that contenders measure in different units."""
    units = results.units(problem, metric)
    if len(units) < 2:
        return ""
    parts = [f"{', '.join(names)} in {unit or 'no unit'}" for unit, names in units.items()]
    return f"{metric} cannot be compared: {'; '.join(parts)}."


def _measured(results: Results, problem: str) -> list[str]:
    """Metrics with at least one row outside any sweep, in order of appearance."""
    names = results.contenders(problem)
    return [m for m in results.metrics(problem) if any(results.main_rows(problem, name, m) for name in names)]


def _heading(results: Results, problem: str, metric: str) -> str:
    """Name, unit, and an arrow towards the better value."""
    unit = results.unit(problem, metric)
    return f"{metric}{f' ({unit})' if unit else ''}{_ARROWS[results.goal(metric)]}"


def _title(group: str, problem: str) -> str:
    title = _TITLES.get(group, group.replace("_", " ").capitalize())
    return title + (f": {problem}" if problem else "")


def _winners(results: Results, problem: str, entered: Sequence[str], metric: str) -> set[str]:
    if len(results.units(problem, metric)) > 1:
        return set()
    # A contender must not win by the seeds that it lost.
    complete = [name for name in entered if _is_complete(results, problem, name, metric)]
    by_contender = {name: results.values(problem, name, metric) for name in complete}
    return best_and_ties(by_contender, results.goal(metric))


def _entry(results: Results, problem: str, name: str, metric: str, bold: bool, seeds: int | None) -> Entry:
    rows = results.main_rows(problem, name, metric)
    values = results.values(problem, name, metric)
    if _is_grey(results, problem, name, metric):
        computed = [value for value, _ in results.doubtful(problem, name, metric).values()]
        return Entry(format_summary(summarise(computed), seeds) + _UNCONVERGED, grey=True)
    if not values:
        statuses = {row.status for row in rows}
        words = {"nonfinite": "not finite", "failed": "failed"}
        return Entry(next((word for status, word in words.items() if status in statuses), _NOTHING))
    bound = "≤ " if results.protocol(problem, name, metric).startswith("bound") else ""
    lost = results.lost_seeds(problem, name)
    mark = _MARK if results.gaps(problem, name, metric).keys() - lost.keys() else ""
    return Entry(bound + format_summary(summarise(list(values.values())), seeds) + mark, bold)


def difference_table(plan: Mapping[str, Any], results: Results, problem: str) -> TextTable | None:
    """Paired differences of every contender to the first one, by metric; None with one contender."""
    entered = plan["problems"].get(problem, [])
    metrics = [m for m in _measured(results, problem) if results.group(m) != COST]
    if len(entered) < 2 or not metrics:
        return None
    first, *others = entered
    title = f"Differences to {first}" + (f": {problem}" if problem else "")
    table = TextTable(title, ["metric", *(f"{name} − {first}" for name in others)])
    for metric in metrics:
        if len(results.units(problem, metric)) > 1:
            continue
        cells = [_difference_entry(results, problem, (name, first), metric, len(plan["seeds"])) for name in others]
        if any(cell.text != _NOTHING for cell in cells):
            table.rows.append([Entry(_heading(results, problem, metric)), *cells])
    table.notes = _gap_notes(results, problem, entered, metrics)
    if any(cell.text.rstrip(_MARK).endswith(_LUCK) for row in table.rows for cell in row):
        table.notes.append(f"≈: a gap below {LOTTERY:.1%}, inside the training lottery ({LOTTERY_SOURCE}).")
    return table if table.rows else None


def _difference_entry(results: Results, problem: str, pair: tuple[str, str], metric: str, seeds: int) -> Entry:
    """The difference of a pair of contenders; what lacks a planned seed is marked, and never bold."""
    left, right = (results.values(problem, name, metric) for name in pair)
    paired = paired_difference(left, right)
    if paired is None:
        return Entry(_NOTHING)
    sign = "+" if paired.mean > 0 else ""
    complete = all(_is_complete(results, problem, name, metric) for name in pair)
    word = " (equal)" if paired.is_zero else " (tie)" if paired.is_tie else ""
    count = " (n=1)" if paired.is_tie is None and seeds == 1 else ""  # else format_summary has written it
    means = (summarise([side[seed] for seed in left.keys() & right.keys()]).mean for side in (left, right))
    luck = _LUCK if is_inside_lottery(metric, *means) else ""
    text = f"{sign}{format_summary(paired, seeds)}{word}{count}{luck}"
    return Entry(text if complete else text + _MARK, bold=complete and paired.is_tie is False)


def seed_table(plan: Mapping[str, Any], results: Results, problem: str) -> TextTable | None:
    """Every value of every seed, main rows only, and what became of the seeds without one."""
    metrics = _measured(results, problem)
    if not metrics:
        return None
    table = TextTable(f"Per seed{f': {problem}' if problem else ''}", ["contender", "seed", *metrics])
    for name in results.lines(problem, plan["problems"].get(problem, [])):
        values = {metric: results.values(problem, name, metric) for metric in metrics}
        greys = {metric: results.doubtful(problem, name, metric) for metric in metrics}
        gaps = {m: results.gaps(problem, name, m) if _has_rows(results, problem, name, m) else {} for m in metrics}
        lost = results.lost_seeds(problem, name)
        seeds = {seed for m in metrics for seed in (*values[m], *greys[m], *gaps[m])}
        for seed in sorted(seeds | lost.keys()):
            cells = [_seed_entry(seed, values[m], greys[m], gaps[m]) for m in metrics]
            table.rows.append([Entry(name), Entry(str(seed)), *cells])
    return table


def _seed_entry(
    seed: int, values: Mapping[int, float], greys: Mapping[int, tuple[float, str]], gaps: Mapping[int, str]
) -> Entry:
    """A number of one seed, in grey where it has not converged, or what became of it."""
    if seed in values:
        return Entry(f"{values[seed]:.6g}")
    if seed in greys:
        return Entry(f"{greys[seed][0]:.6g}{_UNCONVERGED}", grey=True)
    return Entry(gaps.get(seed, _NOTHING).partition(" (")[0])
