"""Results that others are about to take the place of: nothing measured is lost."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowbench.core.rows import FLOOR_FILE, Row, read_rows

__all__ = ["set_aside"]

ROWS = "rows.jsonl"
_BESIDE = (FLOOR_FILE, "samples.npz", "trajectories.npz", "*.png")
_NAMED = ("dataset", "seed", "protocol", "n", "sampler", "guidance", "weights")
_PROVENANCE = ("steps", "evaluation_seed", "config_hash")


def set_aside(folder: Path, rows: Sequence[Row]) -> Path | None:
    """Move the results in a folder into ``before/`` in it, unless `rows` are the same measurements made again.

    Args:
        folder: where `rows` are to be written.
        rows: what takes their place.

    Returns:
        Where the earlier results are now; None where there were none, or all are measured again.
    """
    if not (folder / ROWS).is_file():
        return None
    try:
        earlier = read_rows(folder / ROWS)
    except ValueError:  # damaged, or of another version of the schema
        return _moved(folder, "unreadable", "cannot be read")
    now = {_identity(row) for row in rows}
    replaced = [row for row in earlier if _identity(row) not in now]
    if not replaced:
        return None
    digest = hashlib.sha256(repr(sorted(map(_identity, earlier), key=repr)).encode()).hexdigest()
    return _moved(folder, digest[:8], f"are of something else ({_change(replaced[0], rows)})")


def _identity(row: Row) -> tuple[Any, ...]:
    """What makes a row the same measurement, whatever its value and whatever its run is called."""
    fields = (row.family, row.contender if row.family == "reference" else "", row.metric, row.axis, row.at)
    return (*fields, *(getattr(row, name) for name in _NAMED), *(row.provenance.get(name) for name in _PROVENANCE))


def _change(earlier: Row, rows: Sequence[Row]) -> str:
    """In what the nearest of the new rows differs."""
    same = [row for row in rows if row.metric == earlier.metric]
    if not same:
        return f"{earlier.metric} was measured then and is not now"
    now = min(same, key=lambda row: sum(a != b for a, b in zip(_identity(row), _identity(earlier), strict=True)))
    pairs = [(name, getattr(earlier, name), getattr(now, name)) for name in _NAMED]
    pairs += [(name, earlier.provenance.get(name), now.provenance.get(name)) for name in _PROVENANCE]
    return ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)


def _moved(folder: Path, name: str, why: str) -> Path:
    target = folder / "before" / name
    target.mkdir(parents=True, exist_ok=True)
    # The rows last: a process that is killed in between does the rest next time.
    for path in [*(found for pattern in _BESIDE for found in sorted(folder.glob(pattern))), folder / ROWS]:
        os.replace(path, target / path.name)
    print(f"the earlier results in {folder} {why}: they are kept in {target}", file=sys.stderr, flush=True)
    return target
