"""The seeds of a bench: one for everything, or axes for what the randomness serves, which are crossed.

``seeds: [0, 1, 2]``, or ``seeds: {all: [0, 1, 2]}``, is three trainings, each with one seed for its initialisation,
data order and training noise. ``seeds: {axes: {init: [0, 1], order: [0, 1], noise: [0], evaluation: [0, 1]}}`` is four
trainings, one for every combination of the first three, each of which is measured with two seeds of the evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowbench.config.text import plain, shown
from flowbench.core.checks import check_seed
from flowbench.core.nearest import suggestion

__all__ = ["EVALUATION", "TRAINING_AXES", "Seeds", "read_bench_seeds"]

TRAINING_AXES = ("init", "order", "noise")
EVALUATION = "evaluation"
_AXES = (*TRAINING_AXES, EVALUATION)


@dataclass(frozen=True)
class Seeds:
    """The seeds of a bench.

    Attributes:
        numbers: the seed that rows carry; of crossed axes, the numbers of the combinations from 0 on.
        axes: the seeds of every axis; empty where one seed keys everything.

    Example:
        >>> seeds = read_bench_seeds("seeds", {"axes": {"init": [0, 1], "order": [5, 6]}})
        >>> seeds.numbers, seeds.of(2)
        ((0, 1, 2, 3), {'init': 1, 'order': 5, 'noise': 0, 'evaluation': 0})
    """

    numbers: tuple[int, ...]
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, number: int) -> dict[str, int]:
        """The seed of every axis in one combination, with the first of the evaluation; empty without axes."""
        if not self.axes:
            return {}
        combinations = list(itertools.product(*(self.axes[name] for name in TRAINING_AXES)))
        return {**dict(zip(TRAINING_AXES, combinations[number], strict=True)), EVALUATION: self.axes[EVALUATION][0]}

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any]) -> Seeds:
        """Those of a bench by its plan, as it is written."""
        return cls(tuple(plan["seeds"]), {name: tuple(axis) for name, axis in plan.get("seed_axes", {}).items()})

    @property
    def crossed(self) -> tuple[str, ...]:
        """Axes whose seeds each stand in several trainings, which are then not independent; none where one varies."""
        found = tuple(name for name in TRAINING_AXES if len(self.axes.get(name, ())) > 1)
        return found if len(found) > 1 else ()

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Seeds of the evaluation beside the first."""
        return tuple(self.axes.get(EVALUATION, ())[1:])

    def settings(self, number: int) -> dict[str, Any]:
        """What an experiment is given beside its ``seed``."""
        of = self.of(number)
        if not of:
            return {}
        own = {"init": of["init"], "noise": of["noise"]}
        return {"seeds": own, "data": {"seed": of["order"]}, "evaluator": {"seed": of[EVALUATION]}}


def read_bench_seeds(name: str, value: Any) -> Seeds:
    """Read ``seeds:`` of a bench file.

    Args:
        name: what the user calls it.
        value: a list, ``{all: list}`` or ``{axes: {axis: list}}``; an axis that is not named has the seed 0.

    Raises:
        ValueError: one line: another form, an unknown axis, or seeds that are none or repeated.
    """
    value = plain(value)
    if not isinstance(value, Mapping):
        return Seeds(_numbers(name, value))
    for key in value:
        if key not in ("all", "axes"):
            raise ValueError(f"{name}: unknown key {key!r}{suggestion(str(key), ('all', 'axes'))}")
    if len(value) != 1:
        raise ValueError(f"{name} is {shown(value)}; give either all or axes")
    if "all" in value:
        return Seeds(_numbers(f"{name}.all", value["all"]))
    axes = value["axes"]
    if not isinstance(axes, Mapping) or not axes:
        raise ValueError(f"{name}.axes is {shown(axes)}; write e.g. {{init: [0, 1], evaluation: [0, 1]}}")
    for axis in axes:
        if axis not in _AXES:
            raise ValueError(f"{name}.axes: unknown key {axis!r}{suggestion(str(axis), _AXES)}")
    found = {axis: _numbers(f"{name}.axes.{axis}", axes.get(axis, [0])) for axis in _AXES}
    total = 1
    for axis in TRAINING_AXES:
        total *= len(found[axis])
    return Seeds(tuple(range(total)), found)


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in value)
    if not whole or not value:
        raise ValueError(f"{name} is {shown(value)}; write a list of whole numbers, e.g. [0, 1, 2]")
    for index, seed in enumerate(value):
        check_seed(f"{name}[{index}]", seed)
    if len(set(value)) < len(value):
        twice = sorted({seed for seed in value if value.count(seed) > 1})
        raise ValueError(f"{name} {shown(value)} name {twice[0]} more than once; a repeated seed adds no evidence")
    return tuple(value)
