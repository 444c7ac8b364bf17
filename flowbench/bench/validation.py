"""Whether the cells of a plan are experiments: every key, class and type, before anything is started."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowbench.bench.plan import Plan, pair_name
from flowbench.config import Composed, Experiment, fingerprint

__all__ = ["check_experiments"]

# Sections that are validated by themselves, with those that they are checked against. The model and the data stay in
# every experiment, which is none without them.
_OPTIONAL = (("trainer", "budget"), ("evaluator",), ("callbacks",), ("loggers",))
_SET_BY_THE_BENCH = ("run", "seed")


def check_experiments(plan: Plan) -> None:
    """Validate what each contender of each task is composed to; nothing is built, and no data are read.

    Most sections are the same in many cells. One that was found valid is not looked at again.

    Raises:
        ValueError: one line with the task, the contender and what is wrong, for the first bad one.
    """
    valid: set[str] = set()
    for (task, contender), content in plan.experiments.items():
        parts = _parts(content)
        if parts.keys() <= valid:
            continue
        known = {key for name, keys in parts.items() if name in valid and keys in _OPTIONAL for key in keys}
        tree = {key: value for key, value in content.items() if key not in known}
        try:
            _validate(tree, plan.bench.path)
        except ValueError as error:
            raise ValueError(f"{pair_name(task, contender)}: {error}") from error
        valid |= parts.keys()


def _validate(tree: Mapping[str, Any], file: Path) -> None:
    Experiment.from_composed(Composed({}, copy.deepcopy(dict(tree)), (file,)))


def _parts(content: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The keys of a configuration that are validated together, by the name of what they hold."""
    optional = {key for keys in _OPTIONAL for key in keys}
    rest = tuple(key for key in content if key not in optional and key not in ("data", *_SET_BY_THE_BENCH))
    parts = (*_OPTIONAL, ("data",), rest)
    # One level down nothing is left out of a fingerprint.
    return {fingerprint({"part": {key: content.get(key) for key in keys}}): keys for keys in parts}
