"""The bench: plan, runner, store, statistics, claims, report.

It starts cells as processes and imports neither a family nor torch.
"""

from __future__ import annotations

from flowbench.bench.comparison import compare
from flowbench.bench.report import build_report

__all__ = ["build_report", "compare"]
