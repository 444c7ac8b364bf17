"""Lines below the tables that keep a reader from claiming too much."""

from __future__ import annotations

from collections.abc import Iterable

from flowbench.rows import Row
from flowbench.sample_size import sample_size_warning

__all__ = ["sample_size_notes"]

INCEPTION_FEATURES = 2048


def sample_size_notes(rows: Iterable[Row]) -> list[str]:
    """One line for every number of samples at which an FID was measured that is small for its claim."""
    counts = sorted({row.n for row in rows if row.metric == "fid" and row.n is not None})
    warnings = (sample_size_warning(count, INCEPTION_FEATURES) for count in counts)
    return [f"fid: {warning}." for warning in warnings if warning is not None]
