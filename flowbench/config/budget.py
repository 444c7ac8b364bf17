"""The one limit on training, read from ``budget:`` or ``trainer.max_steps``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.config.errors import ConfigError
from flowbench.core.checks import LARGEST_BUDGET, check_number
from flowbench.core.nearest import suggestion

__all__ = ["KINDS", "read_budget"]

KINDS = ("train_flops", "train_seconds", "steps", "samples_seen", "epochs")
_WHOLE = frozenset({"steps", "samples_seen"})


def read_budget(budget: Any, trainer: Mapping[str, Any]) -> dict[str, float] | None:
    """The one budget of a run.

    Returns:
        ``{kind: amount}``, or None when the limit is ``trainer.max_steps`` or there is none.

    Raises:
        ConfigError: an unknown kind, an amount that is not positive, or several limits at once.
    """
    if not isinstance(budget, Mapping) and budget is not None:
        raise ConfigError(f"budget must be one of {', '.join(KINDS)}, e.g. budget.steps=1000, got {budget!r}")
    given = {str(k): v for k, v in (budget or {}).items() if v is not None}
    for kind, amount in given.items():
        _check_amount(kind, amount)
    names = [f"budget.{kind}={amount}" for kind, amount in given.items()]
    if trainer.get("max_steps") not in (None, -1):
        names.append(f"trainer.max_steps={trainer['max_steps']}")
    if len(names) > 1:
        raise ConfigError(f"several budgets at once: {', '.join(names)}; keep one")
    return dict(given) or None


def _check_amount(kind: str, amount: Any) -> None:
    if kind not in KINDS:
        raise ConfigError(f"budget: unknown kind '{kind}'{suggestion(kind, KINDS)}")
    try:
        check_number(f"budget.{kind}", amount, above=0, at_most=LARGEST_BUDGET)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if kind in _WHOLE and amount != int(amount):
        raise ConfigError(f"budget.{kind} must be a whole number > 0, got {amount!r}")
