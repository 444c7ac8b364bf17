"""The claims of a bench as Markdown, for the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from flowbench.bench.correction import Corrected
from flowbench.bench.hypotheses import ALPHA, POWER, gap_in_deviations
from flowbench.bench.seed_axes import Seeds
from flowbench.bench.verdicts import VerdictName

__all__ = ["claim_notes", "claims_json", "claims_markdown", "claims_rich"]

_STYLES: dict[VerdictName, str] = {"holds": "green", "fails": "red", "equal": "cyan", "undecided": "yellow"}


def claims_markdown(verdicts: Sequence[Corrected], notes: Sequence[str]) -> str:
    """The report's section on claims; empty without any.

    Args:
        verdicts: those of the file.
        notes: lines below the table.
    """
    if not verdicts:
        return ""
    named = any(v.alone.problem for v in verdicts)
    header = ["claim", *(["problem"] if named else []), *_verdict_columns(verdicts), "why"]
    lines = ["## Claims", "", f"| {' | '.join(header)} |", "|" + ":---|" * len(header)]
    for v in verdicts:
        cells = [
            f"`{v.alone.claim.text}`",
            *([v.alone.problem] if named else []),
            *(f"**{name}**" for name in _names(v, verdicts)),
            v.alone.reason.replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def claims_rich(verdicts: Sequence[Corrected]) -> Table:
    """The same table for the terminal."""
    table = Table(title="Claims", title_justify="left")
    for name in ("claim", "problem", *_verdict_columns(verdicts), "why"):
        table.add_column(name, overflow="fold")
    for v in verdicts:
        names = [Text(name, style=_STYLES[name]) for name in _names(v, verdicts)]
        table.add_row(Text(v.alone.claim.text), Text(v.alone.problem), *names, Text(v.alone.reason))
    return table


def claim_notes(verdicts: Sequence[Corrected], seeds: Seeds) -> list[str]:
    """Lines below the table of claims: what the two verdicts are, and what so many seeds can show.

    Args:
        verdicts: those of the file.
        seeds: those that are planned.
    """
    if not verdicts:
        return []
    notes = []
    if len(verdicts) > 1:
        notes.append(
            f"alone: each claim by itself, false in at most {ALPHA:.0%} of cases; over all {len(verdicts)}: by Holm's "
            f"correction, so that at most {ALPHA:.0%} of such files hold any verdict by chance."
        )
    number = len(seeds.numbers)
    if number == 1:
        notes.append("One seed gives no verdict.")
    elif seeds.crossed:
        notes.append("Crossed seeds give no verdict: they show where spread comes from, not who is better.")
    else:
        notes.append(
            f"{number} seeds can show a gap of {gap_in_deviations(number):.2g} standard deviations of the paired "
            f"difference (in {POWER:.0%} of cases, a claim alone)."
        )
    return notes


def claims_json(verdicts: Sequence[Corrected]) -> str:
    """Every claim with its two verdicts and the numbers behind them; null where there is none."""
    return json.dumps([_record(v) for v in verdicts], indent=2, allow_nan=False) + "\n"


def _record(corrected: Corrected) -> dict[str, Any]:
    alone = corrected.alone
    between = alone.difference
    return {
        "claim": alone.claim.text,
        "problem": alone.problem,
        "verdict": alone.verdict,
        "verdict_over_file": corrected.over_file,
        "p": None if alone.outcome is None else alone.outcome.p,
        "p_over_file": corrected.p,
        "seeds": None if between is None or alone.is_exact else between.n,
        "difference": None if between is None else between.mean,
        "standard_deviation": None if between is None else between.sd,
        "half_width": None if between is None else between.half,
        "ratio": None if alone.ratio is None else list(alone.ratio),
        "detectable": alone.detectable,
        "seeds_needed": alone.seeds_needed,
        "inside_training_lottery": alone.is_inside_lottery,
        "reason": alone.reason,
    }


def _verdict_columns(verdicts: Sequence[Corrected]) -> list[str]:
    return ["verdict"] if len(verdicts) == 1 else ["alone", f"over all {len(verdicts)}"]


def _names(corrected: Corrected, verdicts: Sequence[Corrected]) -> list[VerdictName]:
    """One claim needs no correction."""
    return [corrected.alone.verdict] if len(verdicts) == 1 else [corrected.alone.verdict, corrected.over_file]
