"""The numbers that a claim compares, paired by seed, and why some are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flowbench.bench.claims import Claim, Matched, Quantity
from flowbench.bench.matched import Averages, average_at_equal, describe_ranges, read_curves, swept_axis
from flowbench.bench.results import Results
from flowbench.core.nearest import suggestion

__all__ = ["Sides", "read_sides"]


@dataclass(frozen=True)
class Sides:
    """Both sides of a claim in one problem.

    Attributes:
        left: values on the seeds that both sides have; a constant is repeated.
        right: the same of the right side.
        is_exact: whether both are constants, so that there is nothing to test.
        gaps: a line for each reason why a planned seed has no number.
        notes: reservations about a verdict.
        obstacle: why nothing can be compared; empty where it can.

    Example:
        >>> Sides([1.0, 2.0], [3.0, 3.0]).obstacle
        ''
    """

    left: list[float]
    right: list[float]
    is_exact: bool = False
    gaps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    obstacle: str = ""


def read_sides(claim: Claim, results: Results, problem: str) -> Sides:
    """The numbers of a claim in one problem.

    Args:
        claim: the claim.
        results: the rows that may decide a claim.
        problem: the problem of a side that names none.
    """
    for side in claim.quantities:
        if claim.matched is None and not side.values(results, problem_of(side, problem)):
            return Sides([], [], obstacle=_missing(side, results, problem))
    if (units := _units(claim, results, problem)) is not None:
        return Sides([], [], obstacle=f"not comparable: {units[0]} against {units[1]}")
    if (apart := _apart(claim, results, problem)) is not None:
        return Sides([], [], obstacle=f"not comparable: {apart} is of its own kind")
    if claim.matched is not None:
        found = _at_equal(claim, claim.matched, results, problem)
    else:
        gaps = tuple(gap for side in claim.quantities for gap in _gaps(side, results, problem))
        left, right = (_values(side, results, problem) for side in (claim.left, claim.right))
        found = _paired(left, right, gaps, tuple(_notes(claim, results, problem)))
    return found if found.is_exact else replace(found, gaps=(*_shared(results), *found.gaps))


def problem_of(side: Quantity, problem: str) -> str:
    """The problem in which a side is looked up."""
    return side.problem if side.problem is not None else problem


def _paired(
    left: Mapping[int, float] | float, right: Mapping[int, float] | float, gaps: tuple[str, ...], notes: tuple[str, ...]
) -> Sides:
    """The values on the seeds that both sides have."""
    by_seed = [side for side in (left, right) if not isinstance(side, float)]
    if not by_seed:
        assert isinstance(left, float)
        assert isinstance(right, float)
        return Sides([left], [right], is_exact=True, notes=notes)
    seeds = sorted(set(by_seed[0]).intersection(*by_seed[1:]))
    if not seeds:
        return Sides([], [], obstacle="; ".join([*gaps, "the two sides share no seed"]))
    values = [[side] * len(seeds) if isinstance(side, float) else [side[s] for s in seeds] for side in (left, right)]
    return Sides(values[0], values[1], gaps=gaps, notes=notes)


def _values(side: Quantity | float, results: Results, problem: str) -> dict[int, float] | float:
    """A side's values by seed; a number or a reference row is a constant."""
    if isinstance(side, float):
        return side
    values = side.values(results, problem_of(side, problem))
    is_constant = results.is_reference(problem_of(side, problem), side.contender) and len(values) == 1
    return next(iter(values.values())) if is_constant else values


def _at_equal(claim: Claim, matched: Matched, results: Results, problem: str) -> Sides:
    """The sides at equal value of another metric, on each seed."""
    curves, gaps = [], []
    for side in claim.quantities:
        where = problem_of(side, problem)
        axis = swept_axis(results, where, side, matched)
        found, lost = ({}, {}) if axis is None else read_curves(results, where, side, matched, axis)
        if not found and not lost:
            names = f"{side.name} and {matched.metric}"
            return Sides([], [], obstacle=f"{side.contender} has no sweep with {names} in all points")
        curves.append(found)
        gaps += [f"{side.contender} has no curve of seed {seed}: {reason}" for seed, reason in lost.items()]
    goal = results.goal(claim.quantities[0].metric)
    averages: dict[int, Averages] = {}
    for seed in sorted(set(curves[0]) & set(curves[1])):
        average = average_at_equal(curves[0][seed], curves[1][seed], goal)
        if isinstance(average, str):
            gaps.append(f"{matched.metric} of seed {seed}: {average}")
        else:
            averages[seed] = average
    notes = [f"mean over {matched.metric} {describe_ranges(averages)}"] if averages else []
    left, right = ({seed: getattr(a, end) for seed, a in averages.items()} for end in ("left", "right"))
    return _paired(left, right, tuple(gaps), (*notes, *_notes(claim, results, problem)))


def _shared(results: Results) -> Iterable[str]:
    """A line where trainings share seeds: no interval over them has a known error rate."""
    if results.crossed:
        *others, last = results.crossed
        yield f"trainings share seeds ({', '.join(others)} and {last} are crossed), and no interval allows for that"


def _gaps(side: Quantity, results: Results, problem: str) -> Iterable[str]:
    """A line for each reason why planned seeds of a side have no number."""
    by_reason: dict[str, list[str]] = {}
    for seed, reason in side.gaps(results, problem_of(side, problem)).items():
        by_reason.setdefault(reason, []).append(str(seed))
    for reason, seeds in by_reason.items():
        yield f"{side.name} has no number of seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: {reason}"


def _units(claim: Claim, results: Results, problem: str) -> tuple[str, str] | None:
    """The two units of one metric on both sides where they differ, e.g. data units and latent units."""
    if len(claim.quantities) < 2 or claim.quantities[0].metric != claim.quantities[1].metric:
        return None
    left, right = (results.unit_of(problem_of(side, problem), side.contender, side.metric) for side in claim.quantities)
    return (left or "no unit", right or "no unit") if left != right else None


def _apart(claim: Claim, results: Results, problem: str) -> str | None:
    """The side that is the likelihood of a divergence head, where the other is another metric."""
    if len({side.metric for side in claim.quantities}) < 2:
        return None
    protocols = {s.name: results.protocol(problem_of(s, problem), s.contender, s.metric) for s in claim.quantities}
    return next((name for name, protocol in protocols.items() if protocol.startswith("head/")), None)


def _missing(side: Quantity, results: Results, problem: str) -> str:
    where = f" in {problem}" if problem else ""
    problem = problem_of(side, problem)
    known = results.metrics(problem, side.contender)
    if not known:
        lost = "; ".join(dict.fromkeys(results.lost_seeds(problem, side.contender).values()))
        return f"{side.contender} has no rows{where}{': ' * bool(lost)}{lost}"
    if side.metric not in known:
        return f"{side.contender} has no metric {side.metric}{where}{suggestion(side.metric, known, otherwise='')}"
    for _, reason in results.doubtful(problem, side.contender, side.metric, side.at, side.axis).values():
        return f"{side.name} takes part in no claim{where}: {reason}"
    if side.at is None:
        return f"no finite value of {side.name}{where}"
    points = sorted(results.sweep(problem, side.contender, side.metric, side.axis))
    return f"no finite value of {side.name}{where}; measured at {_join(points) or 'no swept points'}"


def _notes(claim: Claim, results: Results, problem: str) -> Iterable[str]:
    """Reservations about a verdict: different protocols, likelihood bounds."""
    sides = claim.quantities
    protocols = [results.protocol(problem_of(s, problem), s.contender, s.metric) for s in sides]
    for side, protocol in zip(sides, protocols, strict=True):
        if protocol.startswith("bound"):
            yield f"{side.name} is an upper bound"
    if len(sides) == 2 and sides[0].metric == sides[1].metric and protocols[0] != protocols[1]:
        yield f"protocols differ ({protocols[0]} | {protocols[1]})"


def _join(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
