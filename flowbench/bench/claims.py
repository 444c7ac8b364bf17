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
**undecided** when it contains 0, when there is one seed only, when a number of any planned seed is missing (a seed that
failed, diverged or is not finished) or when the sides have different units. The sides are **equal** when they differ
on no seed by more than rounding. Against a constant, the interval is that of the mean. Reference rows (floor, noise,
gaussian, gmm) are computed once and count as constants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flowbench.bench.statistics import ROUNDING, Summary, difference, paired_difference, summarise
from flowbench.bench.store import REFERENCES, Results
from flowbench.core.nearest import suggestion
from flowbench.core.sweep import SweepAxis

__all__ = ["Claim", "Quantity", "Verdict", "VerdictName", "judge", "parse_claim"]

VerdictName = Literal["holds", "fails", "equal", "undecided"]

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

    def gaps(self, results: Results, task: str) -> dict[int, str]:
        """Planned seeds without a finite number in one task, with the reason of each."""
        return results.gaps(task, self.contender, self.metric, self.at, self.axis)

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
    verdict: VerdictName
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
        if not side.values(results, _task_of(side, task)):
            return Verdict(claim, task, "undecided", _missing(side, results, task))
    if (units := _units(claim, results, task)) is not None:
        return Verdict(claim, task, "undecided", f"not comparable: {units[0]} against {units[1]}")
    gaps = [gap for side in claim.quantities for gap in _gaps(side, results, task)]
    between, exact = _difference(claim, results, task)
    if between is None:
        return Verdict(claim, task, "undecided", "; ".join([*gaps, "the two sides share no seed"]))
    described = _describe(between, exact)
    if gaps:
        return Verdict(claim, task, "undecided", f"{'; '.join(gaps)}; otherwise {described}", between)
    verdict = _verdict(claim, between, exact)
    return Verdict(claim, task, verdict, "; ".join([described, *_notes(claim, results, task)]), between)


def _verdict(claim: Claim, between: Summary, exact: bool) -> VerdictName:
    """What the interval of left - right says, of a claim that lacks no number."""
    if between.is_zero:
        return "equal"
    if between.half is None and not exact:
        return "undecided"
    sign = 1.0 if claim.operator == "<" else -1.0
    half = between.half or 0.0
    low, high = sorted((sign * (between.mean - half), sign * (between.mean + half)))
    if high < 0:
        return "holds"
    return "fails" if low > 0 else "undecided"


def _gaps(side: Quantity, results: Results, task: str) -> Iterable[str]:
    """A line for each reason why planned seeds of a side have no number."""
    by_reason: dict[str, list[str]] = {}
    for seed, reason in side.gaps(results, _task_of(side, task)).items():
        by_reason.setdefault(reason, []).append(str(seed))
    for reason, seeds in by_reason.items():
        yield f"{side.name} has no number of seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: {reason}"


def _task_of(side: Quantity, task: str) -> str:
    return side.task if side.task is not None else task


def _units(claim: Claim, results: Results, task: str) -> tuple[str, str] | None:
    """The two units of one metric on both sides where they differ, e.g. data units and latent units."""
    if len(claim.quantities) < 2 or claim.quantities[0].metric != claim.quantities[1].metric:
        return None
    left, right = (results.unit_of(_task_of(side, task), side.contender, side.metric) for side in claim.quantities)
    return (left or "no unit", right or "no unit") if left != right else None


def _difference(claim: Claim, results: Results, task: str) -> tuple[Summary | None, bool]:
    """Summary of left - right over shared seeds, and whether both sides are constants."""
    sides: list[dict[int, float] | float] = []
    for side in (claim.left, claim.right):
        if isinstance(side, float):
            sides.append(side)
            continue
        values = side.values(results, _task_of(side, task))
        constant = results.is_reference(_task_of(side, task), side.contender) and len(values) == 1
        sides.append(next(iter(values.values())) if constant else values)
    left, right = sides
    if isinstance(left, float) and isinstance(right, float):
        return summarise([difference(left, right)]), True
    if isinstance(left, float):
        assert not isinstance(right, float)
        return summarise([difference(left, value) for value in right.values()]), False
    if isinstance(right, float):
        return summarise([difference(value, right) for value in left.values()]), False
    return paired_difference(left, right), False


def _describe(between: Summary, exact: bool) -> str:
    if between.is_zero:
        seeds = "" if exact else f" on {between.n} seed{'s' * (between.n > 1)}"
        return f"equal to a relative {ROUNDING:g}{seeds}"
    if exact:
        return f"difference {between.mean:.4g} between two constants"
    if between.half is None:
        return f"one seed, difference {between.mean:.4g}, no interval"
    low, high = between.mean - between.half, between.mean + between.half
    return f"difference {between.mean:.4g}, 95% interval [{low:.4g}, {high:.4g}], {between.n} seeds"


def _missing(side: Quantity, results: Results, task: str) -> str:
    where = f" in {task}" if task else ""
    task = _task_of(side, task)
    known = results.metrics(task, side.contender)
    if not known:
        lost = "; ".join(dict.fromkeys(results.lost_seeds(task, side.contender).values()))
        return f"{side.contender} has no rows{where}{': ' * bool(lost)}{lost}"
    if side.metric not in known:
        return f"{side.contender} has no metric {side.metric}{where}{suggestion(side.metric, known, otherwise='')}"
    if side.at is None:
        return f"no finite value of {side.name}{where}"
    points = sorted(results.sweep(task, side.contender, side.metric, side.axis))
    return f"no finite value of {side.name}{where}; measured at {_join(points) or 'no swept points'}"


def _notes(claim: Claim, results: Results, task: str) -> Iterable[str]:
    """What a reader must know before trusting the verdict: other protocols, likelihood bounds."""
    sides = claim.quantities
    protocols = [results.protocol(_task_of(s, task), s.contender, s.metric) for s in sides]
    for side, protocol in zip(sides, protocols, strict=True):
        if protocol.startswith("bound"):
            yield f"{side.name} is an upper bound"
    if len(sides) == 2 and sides[0].metric == sides[1].metric and protocols[0] != protocols[1]:
        yield f"protocols differ ({protocols[0]} | {protocols[1]})"


def _join(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
