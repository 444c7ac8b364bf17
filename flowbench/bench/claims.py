"""Claims: falsifiable lines of a bench file, judged on paired intervals over seeds.

Grammar::

    claim    := side ("<" | ">") side
    side     := NUMBER | [NUMBER "*"] quantity
    quantity := [TASK "/"] CONTENDER "." METRIC ["@" (NETWORK_EVALUATIONS | "guidance=" SCALE)]

Examples: ``wcfm.straightness < cfm.straightness``, ``wcfm.fd[digits-cnn]@4 < 0.5 * noise.fd[digits-cnn]``,
``moons/otcfm.npe < moons/cfm.npe``, ``tarflow.nll < 2.6``. A claim that names no task is judged once in every
task where its contenders take part. ``@8`` reads the rows of the sweep at 8 network evaluations, ``@guidance=3`` those
at guidance scale 3.

Verdict: the difference left - right is formed seed by seed. The claim **holds** when the 95 % t-interval of the
mean difference lies wholly on the claimed side of 0, **fails** when it lies wholly on the other side, and is
**undecided** when it contains 0, when there is one seed only, when a number is missing or when the sides have
different units. Against a constant, the interval is that of the mean. Reference rows (floor, noise, gaussian, gmm)
are computed once and count as constants.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flowbench.bench.statistics import Summary, paired_difference, summarise
from flowbench.bench.store import REFERENCES, Results, SweepAxis

__all__ = ["Claim", "Quantity", "Verdict", "judge", "parse_claim"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SIDE = re.compile(
    rf"(?:(?P<factor>{_NUMBER})\s*\*\s*)?(?:(?P<task>[\w-]+)/)?"
    r"(?P<contender>[\w-]+)\.(?P<metric>\w+(?:\[[^\]]+\])?)(?:@(?P<axis>guidance=)?(?P<at>\d+(?:\.\d+)?))?"
)


@dataclass(frozen=True)
class Quantity:
    """A metric of a contender: ``factor * task/contender.metric@at``; ``axis`` says what ``at`` counts."""

    contender: str
    metric: str
    task: str | None = None
    at: float | None = None
    axis: SweepAxis = "network_evaluations"
    factor: float = 1.0

    def values(self, results: Results, task: str) -> dict[int, float]:
        """The quantity per seed in one task."""
        found = results.values(task, self.contender, self.metric, self.at, self.axis)
        return {seed: self.factor * value for seed, value in found.items()}

    @property
    def name(self) -> str:
        """``contender.metric@at``."""
        axis = "guidance=" if self.axis == "guidance" else ""
        at = f"@{axis}{self.at:g}" if self.at is not None else ""
        return f"{self.contender}.{self.metric}{at}"


@dataclass(frozen=True)
class Claim:
    """``left`` is claimed to be below (``<``) or above (``>``) ``right``."""

    text: str
    left: Quantity | float
    right: Quantity | float
    operator: Literal["<", ">"]

    @property
    def quantities(self) -> list[Quantity]:
        """The sides that are not numbers."""
        return [side for side in (self.left, self.right) if isinstance(side, Quantity)]


@dataclass(frozen=True)
class Verdict:
    """What the rows say about a claim in one task."""

    claim: Claim
    task: str
    verdict: Literal["holds", "fails", "undecided"]
    reason: str
    difference: Summary | None = None


def parse_claim(text: str) -> Claim:
    """Parse one claim.

    Raises:
        ValueError: when the text does not follow the grammar of this module.
    """
    parts = re.split(r"([<>])", str(text))
    if len(parts) != 3:
        raise ValueError(f"claim {text!r}: write exactly one < or >, e.g. wcfm.straightness < cfm.straightness")
    left, right = (_parse_side(part.strip(), text) for part in (parts[0], parts[2]))
    claim = Claim(str(text).strip(), left, right, "<" if parts[1] == "<" else ">")
    if not claim.quantities:
        raise ValueError(f"claim {text!r} compares two numbers; name a contender's metric on one side")
    tasks = {side.task for side in claim.quantities if side.task is not None}
    if len(tasks) == 1:
        task = tasks.pop()
        left, right = (replace(s, task=task) if isinstance(s, Quantity) else s for s in (left, right))
        return replace(claim, left=left, right=right)
    if tasks and any(side.task is None for side in claim.quantities):
        raise ValueError(f"claim {text!r} names a task on one side only")
    return claim


def _parse_side(part: str, text: str) -> Quantity | float:
    if re.fullmatch(_NUMBER, part):
        return float(part)
    match = _SIDE.fullmatch(part)
    if match is None:
        raise ValueError(
            f"claim {text!r}: {part!r} is neither a number nor [TASK/]CONTENDER.METRIC[@NFE or @guidance=SCALE]"
        )
    if match["at"] and not match["axis"] and not match["at"].isdigit():
        raise ValueError(f"claim {text!r}: @{match['at']} is no whole number of evaluations; a scale is @guidance=...")
    return Quantity(
        contender=match["contender"],
        metric=match["metric"],
        task=match["task"],
        at=float(match["at"]) if match["at"] else None,
        axis="guidance" if match["axis"] else "network_evaluations",
        factor=float(match["factor"]) if match["factor"] else 1.0,
    )


def judge(claim: Claim, results: Results, tasks: Mapping[str, Sequence[str]]) -> list[Verdict]:
    """Judge a claim on the rows.

    Args:
        claim: the parsed claim.
        results: the rows of the bench.
        tasks: task name -> contenders that take part in it.

    Returns:
        One verdict per task in which every contender of the claim takes part; one undecided verdict when
        there is none.
    """
    named = {side.task for side in claim.quantities}
    if named != {None}:
        label = " vs ".join(sorted(str(task) for task in named))
        return [_judge_in(claim, results, label)]
    verdicts = [
        _judge_in(claim, results, task)
        for task, contenders in tasks.items()
        if all(side.contender in (*contenders, *REFERENCES) for side in claim.quantities)
    ]
    return verdicts or [Verdict(claim, "", "undecided", "no task holds all of its contenders")]


def _judge_in(claim: Claim, results: Results, task: str) -> Verdict:
    for side in claim.quantities:
        if not side.values(results, side.task if side.task is not None else task):
            return Verdict(claim, task, "undecided", _missing(side, results, task))
    if (units := _units(claim, results, task)) is not None:
        return Verdict(claim, task, "undecided", f"not comparable: {units[0]} against {units[1]}")
    difference, exact = _difference(claim, results, task)
    if difference is None:
        return Verdict(claim, task, "undecided", "the two sides share no seed")
    notes = "".join(f"; {note}" for note in _notes(claim, results, task))
    if difference.half is None and not exact:
        reason = f"one seed, difference {difference.mean:.4g}, no interval{notes}"
        return Verdict(claim, task, "undecided", reason, difference)
    sign = 1.0 if claim.operator == "<" else -1.0
    half = difference.half or 0.0
    low, high = sorted((sign * (difference.mean - half), sign * (difference.mean + half)))
    verdict: Literal["holds", "fails", "undecided"] = "undecided"
    if high < 0:
        verdict = "holds"
    elif low > 0:
        verdict = "fails"
    return Verdict(claim, task, verdict, _describe(difference, exact) + notes, difference)


def _units(claim: Claim, results: Results, task: str) -> tuple[str, str] | None:
    """The two units of one metric on both sides where they differ, e.g. data units and latent units."""
    if len(claim.quantities) < 2 or claim.quantities[0].metric != claim.quantities[1].metric:
        return None
    left, right = (
        results.unit_of(side.task if side.task is not None else task, side.contender, side.metric)
        for side in claim.quantities
    )
    return (left or "no unit", right or "no unit") if left != right else None


def _difference(claim: Claim, results: Results, task: str) -> tuple[Summary | None, bool]:
    """Summary of left - right over shared seeds, and whether both sides are constants."""
    sides: list[dict[int, float] | float] = []
    for side in (claim.left, claim.right):
        if isinstance(side, float):
            sides.append(side)
            continue
        values = side.values(results, side.task if side.task is not None else task)
        constant = side.contender in REFERENCES and len(values) == 1
        sides.append(next(iter(values.values())) if constant else values)
    left, right = sides
    if isinstance(left, float) and isinstance(right, float):
        return summarise([left - right]), True
    if isinstance(left, float):
        assert not isinstance(right, float)
        return summarise([left - value for value in right.values()]), False
    if isinstance(right, float):
        return summarise([value - right for value in left.values()]), False
    return paired_difference(left, right), False


def _describe(difference: Summary, exact: bool) -> str:
    if exact or difference.half is None:
        return f"difference {difference.mean:.4g} between two constants"
    low, high = difference.mean - difference.half, difference.mean + difference.half
    return f"difference {difference.mean:.4g}, 95% interval [{low:.4g}, {high:.4g}], {difference.n} seeds"


def _missing(side: Quantity, results: Results, task: str) -> str:
    where = f" in {task}" if task else ""
    task = side.task if side.task is not None else task
    known = results.metrics(task, side.contender)
    if not known:
        return f"{side.contender} has no rows{where}"
    if side.metric not in known:
        near = difflib.get_close_matches(side.metric, known, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        return f"{side.contender} has no metric {side.metric}{where}{hint}"
    points = sorted(results.sweep(task, side.contender, side.metric, side.axis))
    return f"no finite value of {side.name}{where}; measured at {_join(points) or 'no swept points'}"


def _notes(claim: Claim, results: Results, task: str) -> Iterable[str]:
    """What a reader must know before trusting the verdict: other protocols, likelihood bounds."""
    sides = claim.quantities
    protocols = [results.protocol(s.task if s.task is not None else task, s.contender, s.metric) for s in sides]
    for side, protocol in zip(sides, protocols, strict=True):
        if protocol.startswith("bound"):
            yield f"{side.name} is an upper bound"
    if len(sides) == 2 and sides[0].metric == sides[1].metric and protocols[0] != protocols[1]:
        yield f"protocols differ ({protocols[0]} | {protocols[1]})"


def _join(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
