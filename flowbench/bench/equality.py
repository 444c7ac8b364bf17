"""What a bench asks to be equal among its contenders, and who is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.bench.results import Results

__all__ = ["EQUAL", "TOLERANCE", "equality_notes"]

EQUAL = ("parameters",)
"""What ``equal:`` of a bench file may ask for: names of metrics of cost."""
TOLERANCE = 0.05
"""Share of the first contender's number by which another one's may differ."""


def equality_notes(plan: Mapping[str, Any], results: Results, problem: str) -> list[str]:
    """A line for every contender of a problem whose number lies outside of the tolerance around the first one's."""
    return [line for metric in plan.get("equal", ()) for line in _unequal(plan, results, problem, metric)]


def _unequal(plan: Mapping[str, Any], results: Results, problem: str, metric: str) -> list[str]:
    means = {name: results.mean(problem, name, metric) for name in plan["problems"].get(problem, [])}
    known = {name: mean for name, mean in means.items() if mean is not None}
    if not known:
        return []
    (first, wanted), *others = known.items()
    where = f"{problem}: " if problem else ""
    return [
        f"{where}**not equal**: {name} has {value:.0f} {metric}, {value / wanted - 1:+.1%} of {first}'s {wanted:.0f}; "
        f"the bench asks for equal {metric}, within ±{TOLERANCE:.0%}."
        for name, value in others
        if abs(value - wanted) > TOLERANCE * wanted
    ]
