"""Results that lie under another name: a cell is identified by its configuration, not by its name or its bench's.

A renamed contender or problem, or an experiment that was changed and changed back, finds its cells by the fingerprint
in their ``status.json`` and goes on with them. A renamed bench, a renamed or copied run folder and a moved checkout
find theirs in place, because names and places are no part of the fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from flowbench.bench.plan import Cell, Plan
from flowbench.bench.results import cell_rows
from flowbench.bench.status import lock_is_held, move_aside, read_status
from flowbench.config.compose import read_mapping
from flowbench.config.text import write_yaml
from flowbench.core.storage import write_text

__all__ = ["adopt", "check_rows", "find_kept", "is_finished", "other_home", "rename"]

_BEST_FIRST = ("DONE", "RUNNING", "FAILED", "PENDING")
_STATUS = "status.json"


def check_rows(cell: Cell, directory: Path, bench: str) -> None:
    """Read the rows that a cell left in a directory.

    Raises:
        ValueError: when they are missing, damaged, or those of another cell.
    """
    entry = {"kind": cell.kind, "problem": cell.problem, "contender": cell.contender, "seed": cell.seed}
    cell_rows(directory, entry, bench)


def is_finished(cell: Cell, directory: Path, bench: str) -> bool:
    """Whether a directory holds the finished cell, with its rows."""
    if not read_status(directory).is_done(cell.config_hash):
        return False
    try:
        check_rows(cell, directory, bench)
    except ValueError:
        return False
    return True


def find_kept(plan: Plan) -> dict[Path, Path]:
    """Cells that lie in another directory than their own: the cell's directory -> the one that holds it.

    A directory that belongs to another cell of the plan is not taken from it.
    """
    planned = {cell.directory: cell.config_hash for cell in plan.everything}
    free: dict[str, list[Path]] = {}
    for directory in _directories(plan.directory):
        found = read_status(directory).config_hash
        if found and planned.get(directory) != found:
            free.setdefault(found, []).append(directory)
    for directories in free.values():
        directories.sort(key=lambda path: (_BEST_FIRST.index(read_status(path).state), str(path)))
    kept: dict[Path, Path] = {}
    for cell in plan.everything:
        at_home = read_status(cell.directory).config_hash == cell.config_hash
        if not at_home and free.get(cell.config_hash):
            kept[cell.directory] = free[cell.config_hash].pop(0)
    return kept


def _directories(root: Path) -> Iterator[Path]:
    """Every directory of a bench that holds the status of a cell, those that were moved aside included."""
    for top in (root / "cells", *sorted(root.glob("reference*"))):
        yield from sorted(path.parent for path in top.rglob(_STATUS))


def adopt(plan: Plan, say: Callable[[str], None]) -> None:
    """Put every cell of a bench where its plan looks for it; what belongs to no cell any more is moved aside.

    Killed at any point, the next call goes on.

    Args:
        plan: the plan.
        say: receives one line for everything that was moved.

    Raises:
        ValueError: when a process still works in a directory that has to be moved.
    """
    sources, aside = find_kept(plan), {}
    for cell in plan.everything:
        if read_status(cell.directory).is_stale(cell.config_hash):
            _refuse_held(cell.directory, f"{cell.label}: a process still runs an older experiment")
            there = move_aside(cell.directory)
            aside[there] = cell.label
            sources = {home: _moved(path, cell.directory, there) for home, path in sources.items()}
        source = sources.get(cell.directory)
        if source is not None:
            _refuse_held(source, f"{cell.label}: a process still runs this experiment under its old name")
            _move_content(source, cell.directory)
            aside.pop(source, None)
            say(f"{cell.label}: the same experiment, kept from {source.relative_to(plan.directory)}")
    for there, label in aside.items():
        say(f"{label}: its experiment changed; the old results are kept in {there}")


def _refuse_held(directory: Path, what: str) -> None:
    if lock_is_held(directory):
        raise ValueError(f"{what} in {directory}; wait for it or end it")


def _moved(path: Path, old: Path, new: Path) -> Path:
    """The path after one of its folders was renamed."""
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def _move_content(source: Path, target: Path) -> None:
    """Move what a cell left, its status last: until then it is found where it was."""
    target.mkdir(parents=True, exist_ok=True)
    # The rows of an unnamed problem lie in the folder that holds those of named ones.
    own = [path for path in source.iterdir() if path.name != _STATUS and not (path / _STATUS).is_file()]
    for path in [*own, source / _STATUS]:
        if path != target and not target.is_relative_to(path):
            path.replace(target / path.name)
    for folder in (source, *source.parents):
        with suppress(OSError):  # not empty
            folder.rmdir()
            continue
        break


def rename(cell: Cell) -> None:
    """Give a finished cell's configuration files today's names and place, for commands that start from them."""
    text = cell.config_text()
    if cell.config_path.is_file() and cell.config_path.read_text(encoding="utf-8") == text:
        return
    for path in (cell.directory / "config.yaml", cell.directory / "config.source.yaml"):
        if path.is_file():
            write_text(path, write_yaml({**read_mapping(path), "run": dict(cell.config["run"])}))
    write_text(cell.config_path, text)


def other_home(plan: Plan) -> Path | None:
    """Another bench beside a new one that holds some of its cells already: the same bench before it was renamed."""
    if plan.directory.exists() or not plan.directory.parent.is_dir():
        return None
    wanted = {cell.config_hash for cell in plan.everything}
    for beside in sorted(path.parent for path in plan.directory.parent.glob("*/plan.json")):
        if any(read_status(directory).config_hash in wanted for directory in _directories(beside)):
            return beside
    return None
