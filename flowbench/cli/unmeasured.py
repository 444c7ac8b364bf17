"""What a command says of numbers that could not be computed, or have not converged."""

from __future__ import annotations

import sys
from pathlib import Path

from flowbench.core.launch import is_first_process
from flowbench.core.rows import read_rows, unconverged_text, unmeasured_text
from flowbench.core.statuses import PARTLY_MEASURED

__all__ = ["report_unmeasured"]


def report_unmeasured(folder: Path) -> int:
    """Print a line about the rows of a folder that have no number for a reason; of several processes, the first does.

    Those whose number has not converged have another line.

    Returns:
        The exit status: 0 where every number was computed, converged or not.
    """
    if not is_first_process():
        return 0
    path = folder / "rows.jsonl"
    rows = read_rows(path)
    if unconverged := unconverged_text(rows):
        print(f"flowbench: to be left out of comparisons: {unconverged}", file=sys.stderr)
    text = unmeasured_text(rows)
    if not text:
        return 0
    print(f"flowbench: not measured: {text}; everything else is in {path}", file=sys.stderr)
    return PARTLY_MEASURED
