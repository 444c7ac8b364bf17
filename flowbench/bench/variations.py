"""What cells of one contender and one seed differ in: the size of the training split, the noise of evaluation.

Each variation is a cell of its own. The first is the cell whose numbers stand in the tables; the rows of the others
carry an axis and their place on it, as those of a sweep do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowbench.bench.benchfile import BenchFile

__all__ = ["MAIN", "Variation", "variations"]


@dataclass(frozen=True)
class Variation:
    """One cell of a contender and a seed.

    Attributes:
        axis: what its rows carry as their axis; empty of the main cell.
        at: the place on the axis; None of the main cell.
        overrides: what the bench sets in the cell's experiment.
        trains: whether it is a training of its own, and not another measurement of the main cell's weights.

    Example:
        >>> Variation("train_size", 250, {"data": {"train_size": 250}}).folder
        'train_size-250'
    """

    axis: str = ""
    at: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True

    @property
    def folder(self) -> str:
        """The name of its folders; empty of the main cell."""
        return f"{self.axis}-{self.at}" if self.axis else ""


MAIN = Variation()


def variations(bench: BenchFile) -> tuple[Variation, ...]:
    """The cells of every contender and seed of a bench, the main one first.

    Cells beside the main one measure no sweep of the sampler: a row has one axis.
    """
    sizes = bench.sweep.get("train_size", [])
    sized = [Variation("train_size", int(n), _measured_once({"data": {"train_size": int(n)}})) for n in sizes]
    again = [
        Variation("evaluation_seed", seed, _measured_once({"evaluator": {"seed": seed}}), trains=False)
        for seed in bench.seed_axes.evaluations
    ]
    return (MAIN, *sized, *again)


def _measured_once(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {**overrides, "evaluator": {**overrides.get("evaluator", {}), "sweep": None}}
