"""Ownership of a folder of results, its lock, and the log of errors."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowbench.core.endings import is_expected, keep_details
from flowbench.core.launch import is_first_process
from flowbench.core.rows import read_rows
from flowbench.core.storage import read_record

__all__ = ["KINDS", "claim", "contents", "keeps_details", "read_manifest", "working_in"]

KINDS = {
    "run": "a trained run",
    "reference": "reference rows",
    "external": "images that other code made",
    "predict": "what predict makes",
    "bench": "a bench",
}
"""Kinds of results that a folder may hold."""

# Files that a process killed in the middle of an atomic write leaves beside their targets.
_ABANDONED = re.compile(r"\.[\w.+ -]+\.(ckpt|csv|json|jsonl|npz|png|yaml)\.\w+")


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Hold a folder of results; its lock is the sign of life that a bench looks for.

    Raises:
        ValueError: when another process works there.
    """
    with keeps_details(folder):
        if not is_first_process():
            yield
            return
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process works in {folder}: wait for it, or give another run.dir") from None
            for place in (folder, folder / "checkpoints"):
                _remove_abandoned(place)
            try:
                yield
            except Exception as error:
                if is_new and is_expected(error):
                    _remove_unused(folder)
                raise


def _remove_unused(folder: Path) -> None:
    """Take away a new folder in which a command was refused before it wrote anything."""
    if [path.name for path in folder.iterdir()] == ["lock"]:
        (folder / "lock").unlink()
        folder.rmdir()


def _remove_abandoned(folder: Path) -> None:
    """Delete what earlier processes did not finish to write; no other process writes here now."""
    for path in folder.glob(".*"):
        if _ABANDONED.fullmatch(path.name) and path.is_file():
            path.unlink()


@contextmanager
def keeps_details(folder: Path) -> Iterator[None]:
    """Write the traceback of an unexpected error to the folder's log, where the folder exists."""
    try:
        yield
    except Exception as error:
        if not is_expected(error):
            keep_details(error, folder if folder.is_dir() else None)
        raise


# ---- whose it is --------------------------------------------------------------------------------------


def claim(folder: Path, kind: str, remedy: str) -> None:
    """Refuse to write into a folder that holds another command's results.

    Args:
        folder: where a command is to write.
        kind: what it writes, one of ``KINDS``.
        remedy: which option names another place.

    Raises:
        ValueError: names what lies there.
    """
    found = contents(folder)
    if found is not None and found[0] != kind:
        raise ValueError(f"{folder} holds {found[1]}, which this would mix with {KINDS[kind]}: {remedy}")


def contents(folder: Path) -> tuple[str, str] | None:
    """Kind of a folder's results, one of ``KINDS``, with a description; None without results of flowbench."""
    if (folder / "config.yaml").is_file():
        if not (folder / "config.source.yaml").is_file():
            return "foreign", "a config.yaml that flowbench did not write"
        return "run", KINDS["run"]
    if (folder / "plan.json").is_file():
        return "bench", f"the bench {read_record(folder / 'plan.json').get('name', '')}".rstrip()
    manifest = read_manifest(folder)
    if manifest is not None:
        return "predict", f"what predict made with {manifest['checkpoint']}"
    return _measured(folder / "rows.jsonl")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest that predict wrote; None without one."""
    manifest = read_record(folder / "manifest.json")
    return manifest if "task" in manifest and "checkpoint" in manifest else None


def _measured(path: Path) -> tuple[str, str] | None:
    """What wrote the rows of a file, as kind and description; None without rows."""
    if not path.is_file():
        return None
    try:
        rows = read_rows(path)
    except ValueError:
        return None
    for row in rows:
        if row.family in ("reference", "external"):
            return row.family, f"the rows of {row.contender} ({KINDS[row.family]})"
    return ("run", KINDS["run"]) if rows else None
