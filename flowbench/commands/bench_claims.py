"""Whether the claims of a bench are about numbers that will be there, before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from flowbench.bench.claims import Claim, Quantity
from flowbench.bench.plan import Plan
from flowbench.core.nearest import suggestion
from flowbench.core.sweep import BEST, SweepAxis

if TYPE_CHECKING:
    from flowbench.evaluation.declared import Declared

__all__ = ["check_claims"]

_CHOICES = {"network_evaluations": "number of network evaluations", "guidance": "scale of guidance"}


def check_claims(plan: Plan) -> None:
    """Refuse claims on metrics that a contender or a reference row will not have.

    Models are built on the meta device, those of the contenders that claims name and no others. Metrics and families
    that do not declare their names are believed.

    Raises:
        ValueError: one line with the claim, who lacks the metric, and the nearest that there is.
    """
    known: dict[tuple[str, str], Mapping[str, Declared] | None] = {}
    for claim, side, problem in _sides(plan):
        reference = side.contender in plan.reference_names(problem)
        contender = plan.problems[problem][0] if reference else side.contender
        if (problem, contender) not in known:
            known[problem, contender] = _declared(plan, problem, contender)
        found = known[problem, contender]
        if found is None:
            continue
        try:
            declared = found.get(side.contender if reference else "")
            _check(side, declared)
            _check_company(claim, side, declared)
        except ValueError as error:
            where = f"in problem {problem!r}, " if problem else ""
            raise ValueError(f"{plan.bench.path}: claim {claim.text!r}: {where}{side.contender} {error}") from None


def _sides(plan: Plan) -> Iterator[tuple[Claim, Quantity, str]]:
    """Every quantity of every claim with each problem in which it will be looked up."""
    for claim in plan.bench.claims:
        everywhere = [
            problem
            for problem, contenders in plan.problems.items()
            if all(side.contender in (*contenders, *plan.reference_names(problem)) for side in claim.quantities)
        ]
        for side in (number for named in claim.quantities for number in _numbers(claim, named, plan)):
            for problem in everywhere if side.problem is None else [side.problem]:
                if side.contender in (*plan.problems[problem], *plan.reference_names(problem)):
                    yield claim, side, problem


def _numbers(claim: Claim, side: Quantity, plan: Plan) -> list[Quantity]:
    """What a side of a claim reads: itself, or at equal value of another metric both metrics along the sweep."""
    if claim.matched is None:
        return [side]
    axis = next(iter(plan.bench.sweep)) if claim.matched.axis is None else claim.matched.axis
    swept = replace(side, axis=axis, at=plan.bench.sweep[axis][0])
    return [swept, replace(swept, metric=claim.matched.metric)]


def _check(side: Quantity, declared: Declared | None) -> None:
    """Check that a quantity will be measured.

    Raises:
        ValueError: what is wrong with it, and what to write instead.
    """
    if declared is None:
        raise ValueError("is not measured; the experiment has no evaluator")
    if declared.main is None:
        return
    axis = side.axis.removeprefix(BEST)
    is_swept = axis != "train_size" and (side.at is not None or axis != side.axis)
    swept = declared.swept.get(cast(SweepAxis, axis), frozenset()) if is_swept else frozenset()
    # Some numbers are measured at the points of a sweep alone.
    if side.metric not in declared.main and swept is not None and side.metric not in swept:
        raise ValueError(f"has no metric {side.metric!r}{suggestion(side.metric, declared.main)}")
    if not is_swept:
        return
    if axis not in declared.swept:
        raise ValueError(f"has no choice of its {_CHOICES[axis]}; claim {side.contender}.{side.metric} without @")
    if swept is not None and side.metric not in swept:
        raise ValueError(f"has no metric {side.metric!r} at the points of a sweep{suggestion(side.metric, swept)}")


def _check_company(claim: Claim, side: Quantity, declared: Declared | None) -> None:
    """Check that a number that means little alone is claimed beside the one that says what it is worth.

    Raises:
        ValueError: where that one will not be measured, or the claim sets the number against another metric.
    """
    beside = "" if declared is None else declared.beside.get(side.metric, "")
    if not beside or declared is None:
        return
    others = sorted({other.metric for other in claim.quantities} - {side.metric})
    if others:
        raise ValueError(
            f"has {side.metric}, which is a number of its own kind and no {others[0]}: claim {beside}, or compare "
            f"{side.metric} with another contender's"
        )
    names = declared.main if side.at is None else declared.swept.get(cast(SweepAxis, side.axis.removeprefix(BEST)))
    if names is not None and beside not in names:
        raise ValueError(f"has {side.metric} without {beside}, which says what it is worth: no claim may rest on it")


def _declared(plan: Plan, problem: str, contender: str) -> Mapping[str, Declared] | None:
    """Metrics of a contender and of the problem's reference rows, by name; None if the experiment cannot be built."""
    # Late: only benches with claims pay for these imports, and a bench that lists its plan must answer at once.
    from flowbench.commands.declared_metrics import declared_metrics
    from flowbench.config import Composed, Experiment

    content: dict[str, Any] = copy.deepcopy(dict(plan.experiments[problem, contender]))
    try:
        return declared_metrics(Experiment.from_composed(Composed({}, content, (plan.bench.path,))))
    except Exception:  # an experiment that cannot be built is reported where experiments are checked
        return None
