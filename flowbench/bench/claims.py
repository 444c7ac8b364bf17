"""Claims: falsifiable lines of a bench file.

Grammar::

    claim    := side ("<" | ">") side [matched]
              | side "~" side "within" NUMBER ["%"] [matched]
    side     := NUMBER | [NUMBER "*"] quantity [("+" | "-") NUMBER]
    quantity := [PROBLEM "/"] CONTENDER "." METRIC ["@" PLACE]
    place    := NETWORK_EVALUATIONS | "guidance=" SCALE | "train_size=" SAMPLES
                | ("guidance" | "network_evaluations") "=best"
    matched  := "at" METRIC ["along" ("network_evaluations" | "guidance")]

Examples: ``wcfm.straightness < cfm.straightness``, ``wcfm.fd[digits-cnn]@4 < 0.5 * noise.fd[digits-cnn]``,
``moons/otcfm.npe < moons/cfm.npe``, ``tarflow.nll < 2.6``, ``swan.nll < adamw.nll + 0.02``,
``a.train_seconds < 0.5 * b.train_seconds``, ``a.fd ~ b.fd within 5%``, ``a.nll ~ b.nll within 0.02``,
``raag.fd < cfg.fd at class_accuracy``. A claim that names no problem is judged once in every problem where its
contenders take part. ``@8`` reads the rows of the sweep at 8 network evaluations, ``@guidance=3`` those at guidance
scale 3, ``@train_size=500`` those of a training on 500 samples, ``@guidance=best`` those at the scale that each cell
was found to do best at on the validation split. ``~`` claims that the sides are as good as equal: within a share of the
right side, or within a number in the metric's unit. ``at METRIC`` compares along the sweep, where both contenders have
the same value of that metric.

:mod:`flowbench.bench.verdicts` judges claims, :mod:`flowbench.bench.correction` corrects the verdicts of a file for
their number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, cast

from flowbench.bench.results import Results
from flowbench.core.nearest import suggestion
from flowbench.core.sweep import BEST, SWEEP_AXES, SweepAxis, best_axis, place_name

__all__ = ["Claim", "Margin", "Matched", "Quantity", "parse_claim"]

_SIZE = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = rf"[-+]?{_SIZE}"
_SIDE = re.compile(
    rf"(?:(?P<factor>{_NUMBER})\s*\*\s*)?(?:(?P<problem>[\w-]+)/)?"
    r"(?P<contender>[\w-]+)\.(?P<metric>\w+(?:\[[^\]]+\])?)"
    r"(?:@(?:(?P<axis>guidance|train_size)=)?(?P<at>\d+(?:\.\d+)?)|@(?P<best>guidance|network_evaluations)=best)?"
    rf"(?:\s*(?P<sign>[-+])\s*(?P<margin>{_SIZE}))?"
)
_CONDITIONS = re.compile(
    rf"(?P<side>.*?)(?:\s+within\s+(?P<size>{_SIZE})\s*(?P<percent>%?))?"
    r"(?:\s+at\s+(?P<metric>\w+(?:\[[^\]]+\])?)(?:\s+along\s+(?P<axis>\w+))?)?"
)
_REPAIRS = (
    (r"\s*(?:<=|=<|≤)\s*", " < "),
    (r"\s*(?:>=|=>|≥)\s*", " > "),
    (r"\s*(?:==|~=|=~|~~|≈|\s=\s)\s*", " ~ "),
    (r"(\d)\s*(?:percent|per cent|pct)\b", r"\1%"),
    (r"\bwithin\s*(?:±|\+-|\+/-)\s*", "within "),
    (r"(\s+at\s.+?)(\s+within\s.+)", r"\2\1"),
    (r"\s+(?:@|given|for|with)\s+(?=\w+)", " at "),
    (r"\s+(?:on|over|by)\s+(?=\w+$)", " along "),
)
"""What people write, and what it probably means here."""


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
        return f"{self.contender}.{self.metric}{place_name(self.axis, self.at)}"


@dataclass(frozen=True)
class Margin:
    """How far apart sides may lie that are as good as equal.

    Attributes:
        size: a number > 0: a share of the right side below 1 where ``relative``, else in the metric's unit.
        relative: whether it is a share.

    Example:
        >>> Margin(0.05, relative=True).of(-2.0), Margin(0.05, relative=False).of(-2.0)
        (0.1, 0.05)
    """

    size: float
    relative: bool

    def of(self, right: float) -> float:
        """The distance allowed beside this value of the right side."""
        return self.size * abs(right) if self.relative else self.size


@dataclass(frozen=True)
class Matched:
    """The sides are compared where both contenders have one value of another metric, along a sweep.

    Attributes:
        metric: the metric that is held equal.
        axis: what is swept; None where the bench sweeps one axis.

    Example:
        >>> parse_claim("raag.fd < cfg.fd at class_accuracy along guidance").matched
        Matched(metric='class_accuracy', axis='guidance')
    """

    metric: str
    axis: SweepAxis | None = None


@dataclass(frozen=True)
class Claim:
    """``left`` is claimed to be below (``<``), above (``>``), or as good as equal to (``~``) ``right``.

    Example:
        >>> claim = parse_claim("wcfm.straightness < 0.5 * cfm.straightness")
        >>> claim.left.contender, claim.operator, claim.right.factor
        ('wcfm', '<', 0.5)
        >>> parse_claim("a.fd ~ b.fd within 5%").margin
        Margin(size=0.05, relative=True)
    """

    text: str
    left: Quantity | float
    right: Quantity | float
    operator: Literal["<", ">", "~"]
    margin: Margin | None = None
    matched: Matched | None = None

    @property
    def quantities(self) -> list[Quantity]:
        """The sides that are not numbers."""
        return [side for side in (self.left, self.right) if isinstance(side, Quantity)]


def parse_claim(text: str) -> Claim:
    """Parse one claim.

    Raises:
        ValueError: one line that names the claim, what is wrong with it and the nearest right form, when the text does
            not follow the grammar of this module.
    """
    text = " ".join(str(text).split())
    try:
        return _parse(text)
    except ValueError as error:
        raise ValueError(f"claim {text!r}: {error}; {_nearest_form(text)}") from None


def _parse(text: str) -> Claim:
    parts = re.split(r"([<>~])", text)
    if len(parts) != 3 or not parts[2]:
        raise ValueError("write exactly one of <, > and ~ between two sides")
    operator = cast(Literal["<", ">", "~"], parts[1])
    conditions = _CONDITIONS.fullmatch(parts[2])
    assert conditions is not None  # every part of the pattern may be empty
    left, right = _parse_side(parts[0].strip()), _parse_side(conditions["side"].strip())
    margin = _margin(operator, conditions["size"], bool(conditions["percent"]))
    matched = _matched(conditions["metric"], conditions["axis"])
    claim = _in_one_problem(Claim(text, left, right, operator, margin, matched))
    if matched is not None:
        _check_matched(claim, matched)
    return claim


def _in_one_problem(claim: Claim) -> Claim:
    """The claim with the one problem that it names on both of its sides."""
    if not claim.quantities:
        raise ValueError("it compares two numbers; name a contender's metric on one side")
    problems = {side.problem for side in claim.quantities if side.problem is not None}
    if len(problems) != 1:
        return claim
    problem = problems.pop()
    left, right = (replace(s, problem=problem) if isinstance(s, Quantity) else s for s in (claim.left, claim.right))
    return replace(claim, left=left, right=right)


def _margin(operator: str, size: str | None, is_percent: bool) -> Margin | None:
    if operator != "~":
        if size is not None:
            raise ValueError("within belongs to ~, equal but for so much; < and > take a factor or + NUMBER")
        return None
    if size is None:
        raise ValueError("~ needs how close the sides must be, within NUMBER or within NUMBER%")
    number = float(size) / 100 if is_percent else float(size)
    if not 0 < number < (1 if is_percent else float("inf")):
        raise ValueError(f"within {size}{'%' * is_percent} is no margin; write a number > 0, as a share below 100%")
    return Margin(number, is_percent)


def _matched(metric: str | None, axis: str | None) -> Matched | None:
    if metric is None:
        return None
    if axis is not None and axis not in SWEEP_AXES:
        raise ValueError(f"nothing is swept along {axis!r}{suggestion(axis, SWEEP_AXES)}")
    return Matched(metric, cast(SweepAxis | None, axis))


def _check_matched(claim: Claim, matched: Matched) -> None:
    if len(claim.quantities) < 2:
        raise ValueError(f"at {matched.metric} compares two contenders along a sweep, and one side is a number")
    for side in claim.quantities:
        if side.at is not None or side.axis.startswith(BEST):
            place = place_name(side.axis, side.at)
            raise ValueError(f"at {matched.metric} compares along the whole sweep; leave {place} out")
        if side.metric == matched.metric:
            raise ValueError(f"{matched.metric} is both compared and held equal")


def _nearest_form(text: str) -> str:
    """The user's line with likely mistakes mended where that can be parsed, else an example of its kind."""
    candidate = text
    for pattern, replacement in _REPAIRS:
        candidate = re.sub(pattern, replacement, candidate)
    if " within " in candidate:
        candidate = re.sub("[<>]", "~", candidate)
    elif "~" in candidate:
        candidate = re.sub(r"(?=\s+at\s)|$", " within 5%", candidate, count=1)
    candidate = " ".join(candidate.split())
    try:
        _parse(candidate)
    except ValueError:
        pass
    else:
        return f"did you mean {candidate!r}?"
    if "~" in candidate:
        return "write e.g. 'a.fd ~ b.fd within 5%'"
    return f"write e.g. 'a.fd < b.fd{' at class_accuracy' * (' at ' in text)}'"


def _parse_side(part: str) -> Quantity | float:
    if re.fullmatch(_NUMBER, part):
        return float(part)
    match = _SIDE.fullmatch(part)
    if match is None:
        raise ValueError(
            f"{part!r} is neither a number nor "
            "[NUMBER *] [PROBLEM/]CONTENDER.METRIC[@NFE, @guidance=SCALE, @train_size=SAMPLES or @guidance=best] "
            "[+ or - NUMBER]"
        )
    if match["at"] and not match["axis"] and not match["at"].isdigit():
        raise ValueError(f"@{match['at']} is no whole number of evaluations; a scale is @guidance=...")
    return Quantity(
        contender=match["contender"],
        metric=match["metric"],
        problem=match["problem"],
        at=float(match["at"]) if match["at"] else None,
        axis=best_axis(match["best"]) if match["best"] else cast(SweepAxis, match["axis"] or "network_evaluations"),
        factor=float(match["factor"]) if match["factor"] else 1.0,
        margin=float(match["sign"] + match["margin"]) if match["margin"] else 0.0,
    )
