"""Rows of earlier schemas, as rows of this one.

Schema 1 had neither guidance nor sampler. Schema 2 had no goal, group, axis and place on it: a word in the protocol
marked the points of a sweep, and a table of names said the rest. The table below is that of schema 2, and stays as it
was: metrics of today declare what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["from_earlier"]

_MARKS = {"sweep": "network_evaluations", "sweep-guidance": "guidance"}
_GOALS = {
    "down": (
        "fid fid_infinity fd fd_infinity kid w2 sliced_w2 mmd nll average_minimum_distance failure_rate "
        "mode_discrepancy mode_matched_w2 straightness path_energy npe_curvature curvature one_step_error "
        "path_length_ratio tilt_source tilt_target network_evaluations train_seconds step_milliseconds peak_memory"
    ),
    "up": (
        "precision recall density coverage inpainting_psnr known_psnr semantic_agreement inception_score "
        "class_accuracy ess samples_per_second flop_utilisation"
    ),
    "zero": "npe npe_coupling",
}
_GROUPS = {
    "transport": (
        "straightness path_energy displacement npe npe_curvature npe_coupling curvature one_step_error "
        "path_length_ratio ess tilt_source tilt_target tilt_share cost_ratio"
    ),
    "cost": (
        "network_evaluations samples_per_second train_seconds step_milliseconds flop_utilisation train_flops "
        "samples_seen peak_memory parameters"
    ),
}
_GOAL_OF = {name: goal for goal, names in _GOALS.items() for name in names.split()}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}


def from_earlier(record: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """The record of a row of schema 1 or 2 with the fields of this one; others are returned as they are."""
    if record.get("schema") not in (1, 2):
        return dict(record)
    new: dict[str, Any] = {"guidance": None, "sampler": "", **record, "schema": schema}
    new["problem"] = new.pop("task", None)
    name = str(new.get("metric")).partition("[")[0]
    new["goal"], new["group"] = _GOAL_OF.get(name, "none"), _GROUP_OF.get(name, "quality")
    parts = str(new.get("protocol")).split("/")
    mark = next((part for part in parts if part in _MARKS), "")
    if mark and new.get(_MARKS[mark]) is None:
        raise ValueError(f"row of a sweep without its {_MARKS[mark]}")
    new["axis"], new["at"] = (_MARKS[mark], new[_MARKS[mark]]) if mark else ("", None)
    if mark and isinstance(new.get("protocol"), str):
        new["protocol"] = "/".join(part for part in parts if part != mark)
    return new
