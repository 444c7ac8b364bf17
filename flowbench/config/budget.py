"""The one limit on training, read from ``budget:`` or ``trainer.max_steps``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowbench.config.errors import ConfigError, suggestion

__all__ = ["KINDS", "check_trainer", "read_budget"]

KINDS = ("train_flops", "train_seconds", "steps", "samples_seen", "epochs")
_WHOLE = frozenset({"steps", "samples_seen"})
_ELSEWHERE = {"callbacks": "callbacks", "callback": "callbacks", "logger": "loggers", "loggers": "loggers"}


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse the Trainer arguments that have another place in an experiment file.

    Raises:
        ConfigError: callbacks or loggers (they are named mappings at the top level), a count of epochs or a time.
    """
    for name in trainer:
        if name in _ELSEWHERE:
            section = _ELSEWHERE[name]
            raise ConfigError(
                f"trainer.{name} is not read; name each one at the top level: "
                f"{section}: {{my_name: {{class_path: ..., init_args: {{...}}}}}}"
            )
    if trainer.get("max_time") is not None:
        raise ConfigError(
            f"trainer.max_time={trainer['max_time']} would be a second limit beside the budget; say "
            "budget.train_seconds=N"
        )
    epochs = trainer.get("max_epochs")
    if epochs not in (None, -1):
        raise ConfigError(
            f"trainer.max_epochs={epochs} has no meaning here, the training loader is endless; "
            f"say budget.epochs={epochs} or trainer.max_steps=N"
        )


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
    whole = kind in _WHOLE
    number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
    if not number or not 0 < amount < math.inf or (whole and amount != int(amount)):
        wanted = "whole number" if whole else "number"
        raise ConfigError(f"budget.{kind} must be a {wanted} > 0, got {amount!r}")
