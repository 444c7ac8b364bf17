"""Claims: falsifiable lines of a bench file, judged on paired intervals over seeds.

Grammar::

    claim    := side ("<" | ">") side
    side     := NUMBER | [NUMBER "*"] quantity [("+" | "-") NUMBER]
    quantity := [PROBLEM "/"] CONTENDER "." METRIC ["@" PLACE]
    place    := NETWORK_EVALUATIONS | "guidance=" SCALE | "train_size=" SAMPLES
                | ("guidance" | "network_evaluations") "=best"

Examples: ``wcfm.straightness < cfm.straightness``, ``wcfm.fd[digits-cnn]@4 < 0.5 * noise.fd[digits-cnn]``,
``moons/otcfm.npe < moons/cfm.npe``, ``tarflow.nll < 2.6``, ``swan.nll < adamw.nll + 0.02``. A claim that names no
problem is judged once in every problem where its contenders take part. ``@8`` reads the rows of the sweep at 8 network
evaluations, ``@guidance=3`` those at guidance scale 3, ``@train_size=500`` those of a training on 500 samples,
``@guidance=best`` those at the scale that each cell was found to do best at on the validation split.

Verdict: the difference left - right is formed seed by seed. The claim **holds** when the 95 % t-interval of the
mean difference lies wholly on the claimed side of 0, **fails** when it lies wholly on the other side, and is
**undecided** when it contains 0, when there is one seed only, when a number of any planned seed is missing (a seed that
failed, diverged or is not finished, or whose number has not converged) or when the sides have different units. The
sides are **equal** when they differ on no seed by more than rounding. Against a constant, the interval is that of the
mean. Reference rows (floor, noise, ...) are computed once and count as constants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from flowbench.bench.results import Results
from flowbench.bench.statistics import ROUNDING, Summary, difference, paired_difference, summarise
from flowbench.core.nearest import suggestion
from flowbench.core.sweep import BEST, SweepAxis, best_axis

__all__ = ["Claim", "Quantity", "Verdict", "VerdictName", "judge", "parse_claim"]

VerdictName = Literal["holds", "fails", "equal", "undecided"]

_SIZE = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = rf"[-+]?{_SIZE}"
_SIDE = re.compile(
    rf"(?:(?P<factor>{_NUMBER})\s*\*\s*)?(?:(?P<problem>[\w-]+)/)?"
    r"(?P<contender>[\w-]+)\.(?P<metric>\w+(?:\[[^\]]+\])?)(?:@(?:(?P<axis>guidance|train_size)=)?(?P<at>\d+(?:\.\d+)?)|@(?P<best>guidance|network_evaluations)=best)?"
    rf"(?:\s*(?P<sign>[-+])\s*(?P<margin>{_SIZE}))?"
)


@dataclass(frozen=True)
class Quantity:
    """A metric of a contender: ``factor * problem/contender.metric@at + margin``; ``axis`` is what ``at`` counts.

    Example:
        >>> Quantity("cfm", "fd", at=4, factor=2.0).name
        'cfm.fd@4'
    """

    contender: str
    metric: str
    problem: str | None = None
    at: float | None = None
    axis: SweepAxis = "network_evaluations"
    factor: float = 1.0
    margin: float = 0.0

    def values(self, results: Results, problem: str) -> dict[int, float]:
        """The quantity per seed in one problem."""
        found = results.values(problem, self.contender, self.metric, self.at, self.axis)
        return {seed: self.factor * value + self.margin for seed, value in found.items()}

    def gaps(self, results: Results, problem: str) -> dict[int, str]:
        """Planned seeds without a finite number in one problem, with the reason of each."""
        return results.gaps(problem, self.contender, self.metric, self.at, self.axis)

    @property
    def name(self) -> str:
        """``contender.metric@at``."""
        if self.axis.startswith(BEST):
            return f"{self.contender}.{self.metric}@{self.axis.removeprefix(BEST)}=best"
        axis = "" if self.axis == "network_evaluations" else f"{self.axis}="
        at = f"@{axis}{self.at:g}" if self.at is not None else ""
        return f"{self.contender}.{self.metric}{at}"


@dataclass(frozen=True)
class Claim:
    """``left`` is claimed to be below (``<``) or above (``>``) ``right``.

    Example:
        >>> claim = parse_claim("wcfm.straightness < 0.5 * cfm.straightness")
        >>> claim.left.contender, claim.operator, claim.right.factor
        ('wcfm', '<', 0.5)
    """

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
    """Whether a claim holds in one problem, by the rows.

    Example:
        >>> from flowbench.bench.results import Results
        >>> (verdict,) = judge(parse_claim("cfm.fd < 2"), Results([]), {"digits": ["cfm"]})
        >>> verdict.problem, verdict.verdict
        ('digits', 'undecided')
    """

    claim: Claim
    problem: str
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
    problems = {side.problem for side in claim.quantities if side.problem is not None}
    if len(problems) == 1:
        problem = problems.pop()
        left, right = (replace(s, problem=problem) if isinstance(s, Quantity) else s for s in (left, right))
        return replace(claim, left=left, right=right)
    if problems and any(side.problem is None for side in claim.quantities):
        raise ValueError(f"claim {text!r} names a problem on one side only")
    return claim


def _parse_side(part: str, text: str) -> Quantity | float:
    if re.fullmatch(_NUMBER, part):
        return float(part)
    match = _SIDE.fullmatch(part)
    if match is None:
        raise ValueError(
            f"claim {text!r}: {part!r} is neither a number nor "
            "[NUMBER *] [PROBLEM/]CONTENDER.METRIC[@NFE, @guidance=SCALE, @train_size=SAMPLES or @guidance=best] "
            "[+ or - NUMBER]"
        )
    if match["at"] and not match["axis"] and not match["at"].isdigit():
        raise ValueError(f"claim {text!r}: @{match['at']} is no whole number of evaluations; a scale is @guidance=...")
    return Quantity(
        contender=match["contender"],
        metric=match["metric"],
        problem=match["problem"],
        at=float(match["at"]) if match["at"] else None,
        axis=best_axis(match["best"]) if match["best"] else cast(SweepAxis, match["axis"] or "network_evaluations"),
        factor=float(match["factor"]) if match["factor"] else 1.0,
        margin=float(match["sign"] + match["margin"]) if match["margin"] else 0.0,
    )


def judge(claim: Claim, results: Results, problems: Mapping[str, Sequence[str]]) -> list[Verdict]:
    """Judge a claim on the rows.

    Args:
        claim: the parsed claim.
        results: the rows of the bench.
        problems: problem name -> contenders and references that stand in it.

    Returns:
        One verdict per problem in which every contender of the claim takes part; one undecided verdict when
        there is none.
    """
    named = {side.problem for side in claim.quantities}
    if named != {None}:
        label = " vs ".join(sorted(str(problem) for problem in named))
        return [_judge_in(claim, results, label)]
    verdicts = [
        _judge_in(claim, results, problem)
        for problem, names in problems.items()
        if all(side.contender in names for side in claim.quantities)
    ]
    return verdicts or [Verdict(claim, "", "undecided", "no problem holds all of its contenders")]


def _judge_in(claim: Claim, results: Results, problem: str) -> Verdict:
    for side in claim.quantities:
        if not side.values(results, _problem_of(side, problem)):
            return Verdict(claim, problem, "undecided", _missing(side, results, problem))
    if (units := _units(claim, results, problem)) is not None:
        return Verdict(claim, problem, "undecided", f"not comparable: {units[0]} against {units[1]}")
    gaps = [gap for side in claim.quantities for gap in _gaps(side, results, problem)]
    between, exact = _difference(claim, results, problem)
    if between is None:
        return Verdict(claim, problem, "undecided", "; ".join([*gaps, "the two sides share no seed"]))
    described = _describe(between, exact)
    if gaps:
        return Verdict(claim, problem, "undecided", f"{'; '.join(gaps)}; otherwise {described}", between)
    verdict = _verdict(claim, between, exact)
    return Verdict(claim, problem, verdict, "; ".join([described, *_notes(claim, results, problem)]), between)


def _verdict(claim: Claim, between: Summary, exact: bool) -> VerdictName:
    """The verdict from the interval of left - right, where no number is missing."""
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


def _gaps(side: Quantity, results: Results, problem: str) -> Iterable[str]:
    """A line for each reason why planned seeds of a side have no number."""
    by_reason: dict[str, list[str]] = {}
    for seed, reason in side.gaps(results, _problem_of(side, problem)).items():
        by_reason.setdefault(reason, []).append(str(seed))
    for reason, seeds in by_reason.items():
        yield f"{side.name} has no number of seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: {reason}"


def _problem_of(side: Quantity, problem: str) -> str:
    return side.problem if side.problem is not None else problem


def _units(claim: Claim, results: Results, problem: str) -> tuple[str, str] | None:
    """The two units of one metric on both sides where they differ, e.g. data units and latent units."""
    if len(claim.quantities) < 2 or claim.quantities[0].metric != claim.quantities[1].metric:
        return None
    left, right = (
        results.unit_of(_problem_of(side, problem), side.contender, side.metric) for side in claim.quantities
    )
    return (left or "no unit", right or "no unit") if left != right else None


def _difference(claim: Claim, results: Results, problem: str) -> tuple[Summary | None, bool]:
    """Summary of left - right over shared seeds, and whether both sides are constants."""
    sides: list[dict[int, float] | float] = []
    for side in (claim.left, claim.right):
        if isinstance(side, float):
            sides.append(side)
            continue
        values = side.values(results, _problem_of(side, problem))
        constant = results.is_reference(_problem_of(side, problem), side.contender) and len(values) == 1
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


def _missing(side: Quantity, results: Results, problem: str) -> str:
    where = f" in {problem}" if problem else ""
    problem = _problem_of(side, problem)
    known = results.metrics(problem, side.contender)
    if not known:
        lost = "; ".join(dict.fromkeys(results.lost_seeds(problem, side.contender).values()))
        return f"{side.contender} has no rows{where}{': ' * bool(lost)}{lost}"
    if side.metric not in known:
        return f"{side.contender} has no metric {side.metric}{where}{suggestion(side.metric, known, otherwise='')}"
    for _, reason in results.unconverged(problem, side.contender, side.metric, side.at, side.axis).values():
        return f"{side.name} takes part in no claim{where}: {reason}"
    if side.at is None:
        return f"no finite value of {side.name}{where}"
    points = sorted(results.sweep(problem, side.contender, side.metric, side.axis))
    return f"no finite value of {side.name}{where}; measured at {_join(points) or 'no swept points'}"


def _notes(claim: Claim, results: Results, problem: str) -> Iterable[str]:
    """Reservations about a verdict: different protocols, likelihood bounds."""
    sides = claim.quantities
    protocols = [results.protocol(_problem_of(s, problem), s.contender, s.metric) for s in sides]
    for side, protocol in zip(sides, protocols, strict=True):
        if protocol.startswith("bound"):
            yield f"{side.name} is an upper bound"
    if len(sides) == 2 and sides[0].metric == sides[1].metric and protocols[0] != protocols[1]:
        yield f"protocols differ ({protocols[0]} | {protocols[1]})"


def _join(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
