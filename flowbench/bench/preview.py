"""The plan as text, for `--dry-run`: contenders, problems, what is finished already, and warnings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from flowbench.bench.kept import find_kept, is_finished, other_home
from flowbench.bench.plan import Cell, Plan
from flowbench.bench.shares import share_notes, shares_text
from flowbench.core.resources import PREFIX, portable_name

__all__ = ["plan_lines", "plan_table"]


def plan_table(plan: Plan) -> Table:
    """The plan as a Rich table: one line per contender and problem."""
    bench = plan.bench
    number = len(plan.cells)
    title = f"{bench.name}: {number} cell{'s' * (number > 1)}"
    table = Table(title=Text(title), title_justify="left")
    kept = find_kept(plan)
    named = any(problem.name for problem in bench.problems)
    for column in (["problem"] if named else []) + ["contender", "experiment", "state"]:
        table.add_column(column, overflow="fold")
    for problem in bench.problems:
        for contender in bench.contenders:
            first = [problem.name] if named else []
            if problem.has(contender.name):
                mine = [c for c in plan.cells if (c.problem, c.contender) == (problem.name, contender.name)]
                place = _place(contender.experiment, bench.path.parent)
                cells, style = [*first, contender.name, place, _state(plan, mine, kept)], ""
            else:
                cells, style = [*first, contender.name, problem.reason, "not applicable"], "dim"
            table.add_row(*map(Text, cells), style=style)  # as text: what a person wrote is no markup
        table.add_section()
    return table


def _place(experiment: Path, folder: Path) -> str:
    """An experiment file as the bench file in a folder would name it."""
    name = portable_name(experiment)
    beside = not name.startswith(PREFIX) or experiment.is_relative_to(folder)
    return os.path.relpath(experiment, folder) if beside else name


def plan_lines(plan: Plan) -> str:
    """Budget, seeds, concurrency and place of a plan, one line each."""
    ((kind, amount),) = plan.bench.budget.items()
    lines = [
        f"every contender: {kind} {amount:g}{shares_text(plan.bench.budget_shares)}",
        f"seeds {', '.join(map(str, plan.bench.seeds))}",
        f"cells run {plan.policy.describe()}",
        f"results in {_short(plan.directory)}",
    ]
    if kind in ("train_seconds", "train_hours") and plan.policy.jobs > 1:
        lines.append(f"training seconds are taken under {plan.policy.jobs} concurrent cells")
    lines += share_notes(plan.bench.budget, plan.bench.budget_shares, plan.experiments)
    if (beside := other_home(plan)) is not None:
        lines.append(
            f"{_short(beside)} holds cells of this bench under another name; to go on with them, rename that folder "
            f"to {_short(plan.directory)}"
        )
    return "\n".join(lines)


def _state(plan: Plan, cells: Sequence[Cell], kept: Mapping[Path, Path]) -> str:
    places = [(cell, kept.get(cell.directory, cell.directory)) for cell in cells]
    done = sum(is_finished(cell, place, plan.bench.name) for cell, place in places)
    moved = [place for cell, place in places if place != cell.directory]
    known = f" (kept in {moved[0].relative_to(plan.directory).parent})" if moved else ""
    return f"{done}/{len(cells)} done{known}" if done else f"to do{known}"


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
