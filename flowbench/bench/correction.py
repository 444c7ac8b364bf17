"""Verdicts over a file of several claims: Holm's correction.

Each claim of a file may be decided by chance, and ten of them by chance in 40 % of all files. Over the file a claim is
decided when Holm's (1979) step-down procedure decides it: where no two sides differ, at most 5 % of all files have any
verdict, whatever their claims have in common. A claim that is judged in several problems counts once in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowbench.bench.claims import Claim
from flowbench.bench.hypotheses import ALPHA
from flowbench.bench.results import Results
from flowbench.bench.verdicts import Verdict, VerdictName, judge

__all__ = ["Corrected", "correct", "holm", "judge_file"]


@dataclass(frozen=True)
class Corrected:
    """A verdict beside that over its file.

    Attributes:
        alone: the verdict of the claim by itself.
        over_file: the verdict over all claims of the file.
        p: Holm's probability; None where nothing was tested.

    Example:
        >>> from flowbench.bench.claims import parse_claim
        >>> from flowbench.bench.hypotheses import Outcome
        >>> from flowbench.bench.verdicts import Verdict
        >>> claims = [parse_claim(f"a.nll < {bound}") for bound in (1, 2)]
        >>> outcomes = [Outcome("holds", 0.01), Outcome("holds", 0.06)]
        >>> alone = [Verdict(c, "", "holds", "", outcome=o) for c, o in zip(claims, outcomes, strict=True)]
        >>> [(verdict.over_file, verdict.p) for verdict in correct(alone)]
        [('holds', 0.02), ('undecided', 0.06)]
    """

    alone: Verdict
    over_file: VerdictName
    p: float | None


def judge_file(claims: Iterable[Claim], results: Results, problems: Mapping[str, Sequence[str]]) -> list[Corrected]:
    """Judge the claims of a file, each alone and over the file.

    The arguments are those of :func:`flowbench.bench.verdicts.judge`.
    """
    return correct([verdict for claim in claims for verdict in judge(claim, results, problems)])


def correct(verdicts: Sequence[Verdict]) -> list[Corrected]:
    """Verdicts over a file. Every claim that chance could have decided counts, also one whose seeds are missing."""
    tested = [verdict for verdict in verdicts if not verdict.is_exact]
    adjusted = iter(holm([1.0 if verdict.outcome is None else verdict.outcome.p for verdict in tested]))
    found = []
    for verdict in verdicts:
        p = None if verdict.is_exact else next(adjusted)
        over_file: VerdictName = verdict.verdict
        if verdict.outcome is not None and p is not None and p >= ALPHA:
            over_file = "undecided"
        found.append(Corrected(verdict, over_file, None if verdict.outcome is None else p))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted probabilities, in the order given: a test is decided at 5 % when its own is below 0.05.

    Args:
        p_values: probabilities in [0, 1].
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
