"""The one limit on training, read from ``budget:`` or ``trainer.max_steps``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.config.errors import ConfigError
from flowbench.core.budget import read_budgets

__all__ = ["read_budget"]


def read_budget(budget: Any, trainer: Mapping[str, Any]) -> dict[str, float] | None:
    """The one budget of a run.

    Returns:
        ``{kind: amount}``, or None when the limit is ``trainer.max_steps`` or there is none.

    Raises:
        ConfigError: an unknown kind, an amount out of range, or several limits at once.
    """
    try:
        given = read_budgets(budget)
    except ValueError as error:
        raise ConfigError(error) from None
    names = [f"budget.{kind}={amount}" for kind, amount in given.items()]
    if trainer.get("max_steps") not in (None, -1):
        names.append(f"trainer.max_steps={trainer['max_steps']}")
    if len(names) > 1:
        raise ConfigError(f"several budgets at once: {', '.join(names)}; keep one")
    return given or None
