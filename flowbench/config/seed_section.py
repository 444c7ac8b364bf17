"""Seeds of one run for what its randomness serves: initialisation, data order, training noise, evaluation noise.

``seed`` keys the first three. ``seeds: {init: 1, noise: 2}`` gives two of them a seed of their own; the order has
``data.seed``, and the evaluation always has ``evaluator.seed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.config.errors import ConfigError
from flowbench.config.text import plain, shown
from flowbench.core.checks import check_seed
from flowbench.core.nearest import suggestion

__all__ = ["OWN_SEEDS", "read_seeds"]

OWN_SEEDS = ("init", "noise")


def read_seeds(value: Any, seed: int) -> dict[str, int]:
    """The seed of the initialisation and that of the training noise.

    Args:
        value: ``seeds:`` of an experiment; None, or one that is null, stands for ``seed``.
        seed: the run's seed.

    Raises:
        ConfigError: no mapping, an unknown name or a seed out of range.
    """
    given = plain(value) if value is not None else {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"seeds must hold 'name: number' lines, e.g. {{init: 1, noise: 2}}, got {shown(value)}")
    for name in given:
        if name not in OWN_SEEDS:
            hint = "; that of the order is data.seed" if name == "order" else ""
            hint = "; that of the evaluation is evaluator.seed" if name == "evaluation" else hint
            raise ConfigError(f"seeds: unknown key '{name}'{hint or suggestion(str(name), OWN_SEEDS)}")
        try:
            check_seed(f"seeds.{name}", given[name], or_none=True)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return {name: seed if given.get(name) is None else int(given[name]) for name in OWN_SEEDS}
