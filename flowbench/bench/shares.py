"""Shares of a bench's budget: what contenders leave to the models that they require."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flowbench.config import fingerprint

__all__ = ["TOLERANCE", "share_notes", "shares_text"]

TOLERANCE = 0.01
"""Share of the budget by which a contender and what it requires may miss it: steps are whole."""


def shares_text(shares: Mapping[str, float]) -> str:
    """What follows a budget where contenders are trained on a part of it; empty where none is.

    Example:
        >>> shares_text({"reflow": 0.5, "distilled": 0.25})
        '; of it reflow 0.5, distilled 0.25, the rest for what they require'
    """
    parts = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    return f"; of it {parts}, the rest for what they require" if parts else ""


def share_notes(
    budget: Mapping[str, float], shares: Mapping[str, float], experiments: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[str]:
    """A line for every contender whose share and what it requires do not make up the budget.

    Nothing is said where a required experiment has a budget of another kind: the two cannot be added.

    Args:
        budget: of the bench, ``{kind: amount}``.
        shares: of the contenders that have not the whole of it.
        experiments: what contenders are composed to, by problem and contender.

    Example:
        >>> teacher = {"budget": {"train_flops": 4e11}}
        >>> share_notes({"train_flops": 1e12}, {"reflow": 0.5}, {("", "reflow"): {"requires": {"teacher": teacher}}})
        ['not equal: reflow has 0.5 of train_flops 1e+12 and what it requires 4e+11, 9e+11 in all']
    """
    ((kind, whole),) = budget.items()
    found: dict[str, None] = {}
    for (_, name), content in experiments.items():
        if name not in shares:
            continue
        required = {fingerprint(needed): needed.get("budget") or {} for needed in _required(content)}
        amounts = [given.get(kind) for given in required.values()]
        if None in amounts:
            continue
        others = sum(float(amount) for amount in amounts if amount is not None)
        total = shares[name] * whole + others
        if abs(total - whole) > TOLERANCE * whole:
            text = f"not equal: {name} has {shares[name]:g} of {kind} {whole:g} and what it requires {others:g}"
            found[f"{text}, {total:g} in all"] = None
    return list(found)


def _required(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The experiments that one requires, to any depth."""
    for needed in (content.get("requires") or {}).values():
        yield dict(needed)
        yield from _required(needed)
