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
_SECTIONS = {"data", *(key for keys in _OPTIONAL for key in keys)}
_NEEDED = {"model", "data"}
_SET_BY_THE_BENCH = ("run", "seed")


def check_experiments(plan: Plan) -> None:
    """Validate and rehearse what each contender of each problem is composed to; no data are read but the user's own.

    Most sections are the same in many cells. One that was found valid is not validated again, and cells that differ in
    nothing are rehearsed once.

    Raises:
        ValueError: one line with the problem, the contender and what is wrong, for the first bad one.
    """
    from flowbench.commands.rehearsal import Rehearsal

    valid: dict[str, Experiment] = {}
    rehearsal, rehearsed = Rehearsal(here=False), set()
    for (problem, contender), content in (*plan.experiments.items(), *plan.varied.items()):
        parts = _parts(content)
        if (names := frozenset(parts)) in rehearsed:
            continue
        try:
            experiment = _validated(content, parts, valid, plan.bench.path)
            rehearsal.run(experiment)
        except ValueError as error:
            raise ValueError(f"{pair_name(problem, contender)}: {error}") from error
        rehearsed.add(names)
        valid |= dict.fromkeys(parts, experiment)


def _validated(
    content: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]], valid: Mapping[str, Experiment], file: Path
) -> Experiment:
    """The experiment of a configuration, in which only sections are validated that were not before."""
    known = {key: valid[name] for name, keys in parts.items() if name in valid for key in keys}
    whole = copy.deepcopy(dict(content))
    if all(name in valid for name in parts):
        # The model's experiment holds what the model requires.
        experiment = known["model"]
    else:
        tree = {key: value for key, value in whole.items() if key not in known or key in (*_NEEDED, "requires")}
        experiment = _validate(tree, file)
    return experiment.completed(whole, {name: known[name] for name in known.keys() & _SECTIONS})


def _validate(tree: dict[str, Any], file: Path) -> Experiment:
    return Experiment.from_composed(Composed({}, tree, (file,)))


def _parts(content: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The keys of a configuration that are validated together, by the name of what they hold."""
    optional = {key for keys in _OPTIONAL for key in keys}
    rest = tuple(key for key in content if key not in optional and key not in ("data", *_SET_BY_THE_BENCH))
    parts = (*_OPTIONAL, ("data",), rest)
    # One level down nothing is left out of a fingerprint.
    return {fingerprint({"part": {key: content.get(key) for key in keys}}): keys for keys in parts}
