"""What moved beyond noise between two runs or benches, and whether for the worse: a gate for changes of code."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from flowbench.bench.results import REFERENCE, Results, is_failure, load_plan, load_rows, may_decide
from flowbench.bench.statistics import Summary, paired_difference, summarise, unpaired_difference
from flowbench.bench.tables import COST, Entry, TextTable, format_summary
from flowbench.core.rows import Goal, Row
from flowbench.core.sweep import BEST, SweepAxis, place_name

__all__ = ["TOLERANCES", "Change", "Gate", "compare_with_baseline"]

TOLERANCES = {"quality": 0.15, "transport": 0.1, COST: 0.25}
"""One seed on a side has no interval: a number moved when it differs by more than this share of the larger one. The
shares are of the size by which single seeds of the shipped benches differ; machines differ more in what they cost."""
OTHER_TOLERANCE = 0.15
"""The same for metrics of all other groups."""
NEGLIGIBLE = 1e-4
"""Changes below this share of the larger number are none: processors round differently."""

ChangeName = Literal["same", "better", "worse", "moved", "lost", "not compared"]
_NOTHING = "–"


@dataclass(frozen=True)
class _Key:
    """What is compared: one number of a contender."""

    problem: str
    contender: str
    metric: str
    axis: str
    at: float | None

    @property
    def name(self) -> str:
        """The metric, and where it was swept."""
        return f"{self.metric}{place_name(self.axis, self.at)}"


@dataclass(frozen=True)
class Change:
    """One number before and after.

    Attributes:
        problem: problem name.
        contender: name in the baseline.
        metric: with the point of a sweep behind ``@``.
        group: of the metric.
        goal: which value is better.
        baseline: mean over the baseline's seeds.
        now: mean over the other run's seeds; None where it has no number.
        difference: now - baseline, with its interval where there is one.
        how: what the verdict rests on, or why there is none.
        verdict: ``lost`` is a number that is no longer there; ``moved`` has no better direction.
    """

    problem: str
    contender: str
    metric: str
    group: str
    goal: Goal
    baseline: Summary
    now: Summary | None
    difference: Summary | None
    how: str
    verdict: ChangeName

    @property
    def is_regression(self) -> bool:
        """Whether it counts against the run: worse or lost, and no cost, which is the machine's too."""
        return self.verdict in ("worse", "lost") and self.group != COST

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        names = ("problem", "contender", "metric", "group", "goal", "how", "verdict")
        numbers = {name: _json(getattr(self, name)) for name in ("baseline", "now", "difference")}
        return {name: getattr(self, name) for name in names} | numbers | {"is_regression": self.is_regression}


def _json(summary: Summary | None) -> dict[str, Any] | None:
    return None if summary is None else {"mean": summary.mean, "half": summary.half, "seeds": summary.n}


@dataclass(frozen=True)
class Gate:
    """All numbers of a run beside those of its baseline."""

    baseline: Path
    run: Path
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    @property
    def regressions(self) -> list[Change]:
        """What became worse or was lost, costs apart."""
        return [change for change in self.changes if change.is_regression]

    def to_json(self) -> str:
        """The gate as indented JSON."""
        record = {
            "baseline": str(self.baseline),
            "run": str(self.run),
            "is_regression": bool(self.regressions),
            "changes": [change.to_dict() for change in self.changes],
            "notes": list(self.notes),
        }
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def text(self) -> str:
        """Tables of what changed, costs apart, and a last line with the verdict."""
        console = Console(file=io.StringIO(), width=max(100, Console().width))
        console.print(f"{self.run} against the baseline {self.baseline}", markup=False, highlight=False, soft_wrap=True)
        for title, is_cost in (("Changed", False), ("Costs that changed (they decide nothing)", True)):
            shown = [c for c in self.changes if c.verdict != "same" and (c.group == COST) == is_cost]
            if shown:
                _table(title, shown).print(console)
        for line in (*self.notes, *self._summary()):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()

    def _summary(self) -> Iterator[str]:
        judged = [c for c in self.changes if c.verdict != "not compared" and c.group != COST]
        with_interval = sum(c.difference is not None and c.difference.half is not None for c in judged)
        same = sum(c.verdict == "same" for c in judged)
        yield f"{len(judged)} numbers compared, {same} of them the same within noise"
        if with_interval:
            yield (
                f"{with_interval} by 95 % t-intervals: where training only draws other random numbers, about "
                f"{with_interval / 40:.2g} become worse by chance"
            )
        if with_interval < len(judged):
            shares = ", ".join(f"{group} {share:.0%}" for group, share in TOLERANCES.items())
            yield f"numbers of one seed by a relative tolerance: {shares}, others {OTHER_TOLERANCE:.0%}"
        count = len(self.regressions)
        yield f"{count} regression{'s' * (count != 1)}" if count else "no regression"


def _table(title: str, changes: Sequence[Change]) -> TextTable:
    named = any(change.problem for change in changes)
    header = [*(["problem"] if named else []), "contender", "metric", "baseline", "now", "change", "verdict", "by"]
    table = TextTable(title, header)
    for c in changes:
        texts = [*([c.problem] if named else []), c.contender, c.metric, format_summary(c.baseline)]
        texts += [_NOTHING if c.now is None else format_summary(c.now), _signed(c.difference)]
        bold = c.verdict in ("worse", "lost")
        table.rows.append([*map(Entry, texts), Entry(c.verdict, bold=bold), Entry(c.how)])
    return table


def _signed(difference: Summary | None) -> str:
    if difference is None:
        return _NOTHING
    return f"{'+' if difference.mean > 0 else ''}{format_summary(difference)}"


def compare_with_baseline(baseline: str | Path, run: str | Path) -> Gate:
    """Compare the numbers of a run or bench with those of an earlier one.

    Contenders meet by their names; two runs of one contender each meet whatever their names. A change is judged by the
    95 % t-interval of the difference, paired by seed where two seeds or more are in both, and by ``TOLERANCES`` where a
    side has one seed, or crosses seeds, which leaves no interval. Numbers of another protocol, unit or version of the
    data are not compared.

    Args:
        baseline: directory of a run or bench.
        run: directory of another one.

    Raises:
        ValueError: when one holds no rows, or the two have no number in common.
    """
    paths = Path(baseline), Path(run)
    before, now = (_results(path) for path in paths)
    names = _matched(before, now)
    keys = dict.fromkeys(key for row in before.rows if (key := _key(row)) is not None and may_decide(row))
    changes = [_change(before, now, key, names[key.contender]) for key in keys if key.contender in names]
    if all(change.now is None for change in changes):
        raise ValueError(f"{paths[1]} has no number in common with {paths[0]}: give runs of one problem and data set")
    absent = sorted({key.contender for key in keys} - names.keys())
    notes = [f"not in {paths[1]}: {', '.join(absent)}"] if absent else []
    return Gate(*paths, tuple(changes), tuple(notes))


def _results(path: Path) -> Results:
    rows = load_rows(path)
    return Results.of_bench(load_plan(path), rows) if (path / "plan.json").is_file() else Results(rows)


def _matched(before: Results, now: Results) -> dict[str, str]:
    """Names in the baseline -> names in the run."""
    theirs, ours = ({row.contender: row.family for row in results.rows} for results in (before, now))
    names = {name: name for name in theirs if name in ours}
    single = [[name for name, family in found.items() if family != REFERENCE] for found in (theirs, ours)]
    if all(len(found) == 1 for found in single):
        names[single[0][0]] = single[1][0]
    return names


def _key(row: Row) -> _Key | None:
    at = None if row.axis.startswith(BEST) else row.at  # each seed has its own best point
    return None if is_failure(row) else _Key(row.problem, row.contender, row.metric, row.axis, at)


def _change(before: Results, now: Results, key: _Key, name: str) -> Change:
    """What became of one number."""
    old, new = _values(before, key, key.contender), _values(now, key, name)
    baseline, after, difference = _mean(old), _mean(new) if new else None, None
    group, goal = before.group(key.metric), before.goal(key.metric)
    verdict: ChangeName
    if how := _gaps(now, key, name, old):
        verdict = "lost"
    elif how := _unlike(_row(before, key, key.contender), _row(now, key, name)):
        verdict = "not compared"
    elif after is None:
        how, verdict = "not measured", "lost"
    else:
        difference, how = _difference(old, new, is_crossed=bool(before.crossed or now.crossed))
        moved = _has_moved(baseline, after, difference, TOLERANCES.get(group, OTHER_TOLERANCE))
        verdict = _direction(goal, baseline.mean, after.mean) if moved else "same"
    return Change(key.problem, key.contender, key.name, group, goal, baseline, after, difference, how, verdict)


def _mean(values: Mapping[int, float]) -> Summary:
    return summarise(list(values.values()))


def _values(results: Results, key: _Key, name: str) -> dict[int, float]:
    return results.values(key.problem, name, key.metric, *_point(key))


def _point(key: _Key) -> tuple[float | None, SweepAxis]:
    """The point and axis as lookups take them."""
    return key.at, cast(SweepAxis, key.axis or "network_evaluations")


def _gaps(now: Results, key: _Key, name: str, old: Mapping[int, float]) -> str:
    """Why seeds of the baseline that the run should have, too, lack their number; empty where none lacks it."""
    found = now.gaps(key.problem, name, key.metric, *_point(key))
    return "; ".join(f"seed {seed}: {reason}" for seed, reason in found.items() if seed in old)


def _row(results: Results, key: _Key, name: str) -> Row | None:
    """A row that the numbers come from."""
    if not key.axis:
        rows = results.main_rows(key.problem, name, key.metric)
    else:
        wanted = _Key(key.problem, name, key.metric, key.axis, key.at)
        rows = [row for row in results.rows if _key(row) == wanted]
    return next((row for row in rows if may_decide(row)), None)


def _unlike(old: Row | None, new: Row | None) -> str:
    """Why two rows do not measure the same thing; empty where they do."""
    if old is None or new is None:
        return ""
    words = {
        "data": (old.dataset, new.dataset),
        "version of the data": (old.provenance.get("dataset_version"), new.provenance.get("dataset_version")),
        "protocol": (old.protocol, new.protocol),
        "unit": (old.unit, new.unit),
    }
    return "; ".join(f"{name} {a or 'none'} before, {b or 'none'} now" for name, (a, b) in words.items() if a != b)


def _difference(old: Mapping[int, float], new: Mapping[int, float], is_crossed: bool) -> tuple[Summary, str]:
    """The number now minus that of the baseline, and what this rests on."""
    if is_crossed:
        return summarise([_mean(new).mean - _mean(old).mean]), "crossed seeds, tolerance"
    shared = len(old.keys() & new.keys())
    paired = paired_difference(new, old)
    if paired is not None and shared > 1:
        return paired, f"{shared} seeds, paired"
    if len(old) > 1 and len(new) > 1:
        return unpaired_difference(list(new.values()), list(old.values())), f"{len(old)} and {len(new)} other seeds"
    if paired is not None:
        return paired, "one seed, tolerance"
    return summarise([_mean(new).mean - _mean(old).mean]), "one seed, tolerance"


def _has_moved(old: Summary, new: Summary, difference: Summary, tolerance: float) -> bool:
    change, size = abs(difference.mean), max(abs(old.mean), abs(new.mean))
    if change <= NEGLIGIBLE * size:
        return False
    return change > tolerance * size if difference.half is None else change > difference.half


def _direction(goal: Goal, old: float, new: float) -> ChangeName:
    if goal == "none":
        return "moved"
    if goal == "zero":
        return "worse" if abs(new) > abs(old) else "better"
    return "worse" if (new > old) == (goal == "down") else "better"
