"""What the metrics of made-up rows declare."""

from __future__ import annotations

from typing import Any

GOALS = {
    "fd": "down", "fid": "down", "w2": "down", "nll": "down", "kid": "down", "straightness": "down",
    "path_energy": "down", "npe": "zero", "precision": "up", "recall": "up", "samples_per_second": "up",
    "failure_rate": "down", "train_seconds": "down",
}  # fmt: skip
GROUPS = {
    "straightness": "transport", "path_energy": "transport", "npe": "transport", "samples_per_second": "cost",
    "train_flops": "cost", "train_seconds": "cost", "parameters": "cost",
}  # fmt: skip


def declared(metric: str) -> dict[str, Any]:
    """Goal and group of a metric, as fields of its row."""
    base = metric.partition("[")[0]
    return {"goal": GOALS.get(base, "none"), "group": GROUPS.get(base, "quality")}
