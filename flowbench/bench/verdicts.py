"""Verdicts: claims judged on differences paired over seeds.

The difference left - right is formed seed by seed. A claim of order **holds** when the 95 % t-interval of the mean
difference lies wholly on the claimed side of 0, and **fails** when it lies wholly on the other side. A claim that the
sides are as good as equal **holds** when the 90 % interval lies within the margins (two one-sided tests at 5 %), and
**fails** when the 95 % interval lies wholly outside them. Otherwise a claim is **undecided**, and so it is when there
is one seed only, when seeds are crossed over several axes (trainings that share a seed are not independent), when a
number of any planned seed is missing (a seed that failed, diverged or is not finished), or when the sides have
different units. The sides are **equal** when they differ on no seed by more than rounding. Against a constant, the
interval is that of the mean. Reference rows (floor, noise, ...) are computed once and count as constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flowbench.bench.claims import Claim, Quantity
from flowbench.bench.frechet import LOTTERY, LOTTERY_SOURCE, is_inside_lottery
from flowbench.bench.hypotheses import (
    ALPHA,
    MOST_SEEDS,
    Equivalence,
    Order,
    Outcome,
    ratio_interval,
    seeds_to_settle,
)
from flowbench.bench.results import Results
from flowbench.bench.sides import Sides, read_sides
from flowbench.bench.statistics import ROUNDING, Summary, difference, summarise

__all__ = ["Verdict", "VerdictName", "judge"]

VerdictName = Literal["holds", "fails", "equal", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds in one problem, by the rows.

    Attributes:
        claim: the claim.
        problem: where it was judged.
        verdict: of this claim alone.
        reason: the numbers behind it.
        difference: left - right over the seeds; None where nothing can be compared.
        outcome: what a test found; None where there was nothing to test.
        is_exact: whether the sides are constants, so that the verdict is no matter of chance.
        detectable: the gap (``~``: the margin) that so many seeds can show; None without an interval.
        seeds_needed: the seeds that would settle an undecided claim if difference and spread stayed; None where it is
            decided, or where no such number is known.
        ratio: left over right with its interval, for claims on a ratio.
        is_inside_lottery: whether two Frechet distances differ by less than trainings of one configuration do.

    Example:
        >>> from flowbench.bench.claims import parse_claim
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
    outcome: Outcome | None = None
    is_exact: bool = False
    detectable: float | None = None
    seeds_needed: int | None = None
    ratio: tuple[float, float, float] | None = None
    is_inside_lottery: bool = False


def judge(claim: Claim, results: Results, problems: Mapping[str, Sequence[str]]) -> list[Verdict]:
    """Judge a claim on the rows.

    Args:
        claim: the parsed claim.
        results: the rows of the bench; those that may not decide a claim are left out.
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
    sides = read_sides(claim, results, problem)
    if sides.obstacle:
        return Verdict(claim, problem, "undecided", sides.obstacle)
    between = summarise(_differences(sides))
    if sides.is_exact:
        reason = "; ".join([_describe_exact(between), *sides.notes])
        return Verdict(claim, problem, _exact(claim, sides, between), reason, between, is_exact=True)
    if between.n == 1:
        described = f"equal to a relative {ROUNDING:g} on one seed" if between.is_zero else _one_seed(between)
        reason = f"{'; '.join(sides.gaps)}; otherwise {described}" if sides.gaps else described
        return Verdict(claim, problem, "undecided", reason, between)
    described = _describe(claim, sides, between)
    if sides.gaps:
        return Verdict(claim, problem, "undecided", f"{'; '.join(sides.gaps)}; otherwise {described}", between)
    if between.is_zero:
        verdict: VerdictName = "equal" if claim.margin is None else "holds"
        return Verdict(claim, problem, verdict, "; ".join([described, *sides.notes]), between)
    return _tested(claim, problem, sides, between, described)


def _tested(claim: Claim, problem: str, sides: Sides, between: Summary, described: str) -> Verdict:
    """The verdict by a test over two seeds or more."""
    if (trouble := _signs(claim, sides)) is not None:
        return Verdict(claim, problem, "undecided", f"{described}; {trouble}", between)
    test = _test(claim, sides, between)
    outcome = test.outcome()
    verdict: VerdictName = outcome.towards if outcome.is_decided else "undecided"
    needed = None if outcome.is_decided else seeds_to_settle(test.outcome, between.n)
    power = [] if outcome.is_decided else [_power_note(claim, test.detectable(), between.n, needed)]
    in_lottery = _is_inside_lottery(claim, sides)
    lottery = [_lottery_note(sides)] if in_lottery else []
    return Verdict(
        claim,
        problem,
        verdict,
        "; ".join([described, *power, *lottery, *sides.notes]),
        between,
        outcome,
        detectable=test.detectable(),
        seeds_needed=needed,
        ratio=_ratio(claim, sides),
        is_inside_lottery=in_lottery,
    )


def _test(claim: Claim, sides: Sides, between: Summary) -> Order | Equivalence:
    if claim.operator != "~":
        return Order(between, claim.operator)
    assert claim.margin is not None
    pairs = list(zip(_differences(sides), map(claim.margin.of, sides.right), strict=True))
    return Equivalence(summarise([gap - margin for gap, margin in pairs]), summarise([gap + m for gap, m in pairs]))


def _exact(claim: Claim, sides: Sides, between: Summary) -> VerdictName:
    """The verdict between two constants."""
    if claim.margin is not None:
        return "holds" if abs(between.mean) <= claim.margin.of(sides.right[0]) else "fails"
    if between.is_zero:
        return "equal"
    return "holds" if (between.mean < 0) == (claim.operator == "<") else "fails"


def _signs(claim: Claim, sides: Sides) -> str | None:
    """Why a share of the right side is no margin."""
    if claim.margin is None or not claim.margin.relative or min(sides.right) > 0 or max(sides.right) < 0:
        return None
    return "a share of the right side means nothing where that changes its sign; give a margin in the metric's unit"


def _is_inside_lottery(claim: Claim, sides: Sides) -> bool:
    if claim.operator == "~" or len({side.metric for side in claim.quantities}) > 1:
        return False
    left, right = (math.fsum(values) / len(values) for values in (sides.left, sides.right))
    return is_inside_lottery(claim.quantities[0].metric, left, right)


def _ratio(claim: Claim, sides: Sides) -> tuple[float, float, float] | None:
    """Ratio of the sides without their factors, and the ends of its interval; None where the claim is on no ratio."""
    factors = _factors(claim)
    if factors is None:
        return None
    left = [value / factors[0] for value in sides.left]
    right = [value / factors[1] for value in sides.right]
    ends = ratio_interval(left, right, _level(claim))
    return None if ends is None else (math.fsum(left) / math.fsum(right), *ends)


def _factors(claim: Claim) -> tuple[float, float] | None:
    """Factors of the two sides of a claim on their ratio."""
    left, right = claim.left, claim.right
    if not isinstance(left, Quantity) or not isinstance(right, Quantity) or left.margin or right.margin:
        return None
    is_share = claim.margin is not None and claim.margin.relative
    if not (is_share or (left.factor, right.factor) != (1.0, 1.0)) or 0.0 in (left.factor, right.factor):
        return None
    return left.factor, right.factor


def _level(claim: Claim) -> float:
    """Coverage of the interval that decides whether a claim holds."""
    return 1 - 2 * ALPHA if claim.operator == "~" else 1 - ALPHA


def _describe_exact(between: Summary) -> str:
    if between.is_zero:
        return f"equal to a relative {ROUNDING:g}"
    return f"difference {between.mean:.4g} between two constants"


def _one_seed(between: Summary) -> str:
    return f"one seed, difference {between.mean:.4g}, no interval"


def _describe(claim: Claim, sides: Sides, between: Summary) -> str:
    """The difference, its interval, and for a ratio that of the ratio."""
    if between.is_zero:
        return f"equal to a relative {ROUNDING:g} on {between.n} seeds"
    level = _level(claim)
    half = summarise(_differences(sides), level).half
    assert half is not None
    low, high = between.mean - half, between.mean + half
    text = f"difference {between.mean:.4g}, {level:.0%} interval [{low:.4g}, {high:.4g}], {between.n} seeds"
    return "; ".join([text, *_ratio_notes(claim, sides)])


def _differences(sides: Sides) -> list[float]:
    return [difference(left, right) for left, right in zip(sides.left, sides.right, strict=True)]


def _ratio_notes(claim: Claim, sides: Sides) -> Iterable[str]:
    if _factors(claim) is None:
        return
    ratio = _ratio(claim, sides)
    if ratio is None:
        yield "the right side may be 0, so the ratio has no bounded interval"
    elif math.fsum(sides.right) < 0:
        yield "the right side is negative, so the difference is judged and no ratio"
    else:
        yield f"ratio {ratio[0]:.4g} [{ratio[1]:.4g}, {ratio[2]:.4g}]"


def _power_note(claim: Claim, detectable: float, n: int, needed: int | None) -> str:
    what = "equality within" if claim.operator == "~" else "a gap of"
    settled = f"{needed} seeds" if needed is not None else f"more than {MOST_SEEDS:,} seeds"
    return f"{n} seeds can show {what} {detectable:.2g}; {settled} would settle it if difference and spread stayed"


def _lottery_note(sides: Sides) -> str:
    left, right = math.fsum(sides.left), math.fsum(sides.right)
    return (
        f"a gap of {abs(left - right) / abs(right):.1%}, inside the training lottery ({LOTTERY:.1%}, {LOTTERY_SOURCE})"
    )
