"""Limits on training: their kinds, their reader, and how many optimiser steps they pay for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from flowbench.core.checks import LARGEST_BUDGET, check_number
from flowbench.core.nearest import suggestion

__all__ = ["BUDGET_KINDS", "BudgetKind", "BudgetLimit", "read_budgets"]

BudgetKind = Literal["train_flops", "train_seconds", "train_hours", "steps", "samples_seen", "epochs"]
BUDGET_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
_SECONDS: dict[str, float] = {"train_seconds": 1.0, "train_hours": 3600.0}

_WHOLE = frozenset({"steps", "samples_seen"})


def read_budgets(mapping: object) -> dict[str, float]:
    """The limits that ``budget:`` of an experiment or a bench sets.

    Args:
        mapping: ``{kind: amount}``; a kind that is null is not set, and None sets nothing.

    Returns:
        Amount of each kind that is set, as it was written.

    Raises:
        ValueError: one line: no mapping, an unknown kind or an amount out of range.
    """
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise ValueError(f"budget must be one of {', '.join(BUDGET_KINDS)}, e.g. budget.steps=1000, got {mapping!r}")
    given = {str(kind): amount for kind, amount in mapping.items() if amount is not None}
    for kind, amount in given.items():
        _check(kind, amount)
    return given


def _check(kind: str, amount: Any) -> None:
    if kind not in BUDGET_KINDS:
        raise ValueError(f"budget: unknown kind '{kind}'{suggestion(kind, BUDGET_KINDS)}")
    check_number(f"budget.{kind}", amount, above=0, at_most=LARGEST_BUDGET)
    if kind in _WHOLE and amount != int(amount):
        raise ValueError(f"budget.{kind} must be a whole number > 0, got {amount!r}")


@dataclass(frozen=True)
class BudgetLimit:
    """One limit on training, the same for all contenders of a bench.

    Attributes:
        kind: floating-point operations, seconds inside training steps, hours of them in a number of steps that is
            planned from the first ones, optimiser steps, samples or passes over the training split.
        amount: how much, in (0, 1e30]; a whole number of steps and samples.

    Raises:
        ValueError: for an unknown kind, or an amount out of range.

    Example:
        >>> BudgetLimit.from_mapping({"epochs": 2}).max_steps(flops_per_step=10**9, batch_size=50, num_train=1000)
        40
        >>> BudgetLimit("train_flops", 4e12).max_steps(flops_per_step=10**9, batch_size=50, num_train=1000)
        4000
    """

    kind: BudgetKind
    amount: float

    def __post_init__(self) -> None:
        """Check kind and amount.

        Raises:
            ValueError: for an unknown kind, or an amount out of range.
        """
        _check(self.kind, self.amount)
        object.__setattr__(self, "amount", float(self.amount))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, float]) -> BudgetLimit:
        """Read ``{kind: amount}``.

        Raises:
            ValueError: when there is not exactly one known kind with an amount in its range.
        """
        given = read_budgets(mapping)
        if len(given) != 1:
            raise ValueError(f"budget must name exactly one of {', '.join(BUDGET_KINDS)}, got {mapping!r}")
        ((kind, amount),) = given.items()
        return cls(cast(BudgetKind, kind), amount)

    @property
    def seconds(self) -> float | None:
        """The limit in seconds; None where it is not one of time."""
        return self.amount * _SECONDS[self.kind] if self.kind in _SECONDS else None

    @property
    def is_planned(self) -> bool:
        """Whether the first steps decide how many there are, and not the clock which is the last."""
        return self.kind == "train_hours"

    def max_steps(self, flops_per_step: int, batch_size: int, num_train: int, spent_flops: float = 0.0) -> int | None:
        """The limit in optimiser steps; None for a limit of time.

        Args:
            flops_per_step: operations of one step over the global batch.
            batch_size: samples per optimiser step over all processes.
            num_train: size of the training split.
            spent_flops: operations before the first step, which a limit on operations pays too.

        Raises:
            ValueError: when the budget does not pay for a single step.
        """
        per_step = {
            "train_flops": float(flops_per_step),
            "steps": 1.0,
            "samples_seen": float(batch_size),
            "epochs": batch_size / num_train,
        }
        if self.seconds is not None:
            return None
        spent = spent_flops if self.kind == "train_flops" else 0.0
        steps = round((self.amount - spent) / per_step[self.kind], 9)
        if steps < 1:
            before = f" after {spent:g} before the first one" if spent else ""
            raise ValueError(
                f"budget.{self.kind}={self.amount:g} does not pay for one step, which costs "
                f"{per_step[self.kind]:g}{before}: raise the budget or lower data.batch_size"
            )
        return int(steps)
